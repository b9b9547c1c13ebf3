"""What one would write first, for `tools.bench.objectives` to compare with: reverse KL of vocabulary shards.

Each function takes this rank's shards of student and teacher logits [N, V/TP] and the incoming gradient [N], and
returns the divergence of every token and the gradient of the student's shard. All compute in float32. Shape
suffixes: N tokens, V columns of the shard, F of the full vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional


class _SumOfShards(torch.autograd.Function):
    """All-reduce of partial sums; every rank goes on with the same numbers, so the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor) -> Tensor:
        return _reduced(partial.clone(), dist.ReduceOp.SUM)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _UsedByShards(torch.autograd.Function):
    """The number itself, of which every rank uses a copy for its own columns: gradients are summed over ranks."""

    @staticmethod
    def forward(ctx: Any, number: Tensor) -> Tensor:
        return number.view_as(number)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _reduced(grad.clone(), dist.ReduceOp.SUM)


def _reduced(values: Tensor, operation: Any) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values, op=operation)
    return values


def _sharded_log_softmax(logits_NV: Tensor) -> Tensor:
    shifted_NV = logits_NV - _reduced(logits_NV.detach().amax(-1, keepdim=True), dist.ReduceOp.MAX)
    total_N1 = _SumOfShards.apply(shifted_NV.exp().sum(-1, keepdim=True))
    return shifted_NV - _UsedByShards.apply(total_N1.log())


def autograd_reverse_kl(student_NV: Tensor, teacher_NV: Tensor, upstream_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-softmax and kl_div under autograd, with all-reduces that have the right gradients: 5 forward, 1 back."""
    student_NV = student_NV.detach().requires_grad_()
    student_logprob_NV = _sharded_log_softmax(student_NV.float())
    with torch.no_grad():
        teacher_logprob_NV = _sharded_log_softmax(teacher_NV.float())
    terms_NV = functional.kl_div(teacher_logprob_NV, student_logprob_NV, reduction="none", log_target=True)
    divergence_N = _SumOfShards.apply(terms_NV.sum(-1))
    (gradient_NV,) = torch.autograd.grad((divergence_N * upstream_N).sum(), student_NV)
    return divergence_N.detach(), gradient_NV


class _SavedSoftmax(torch.autograd.Function):
    """Softmax and both log-softmaxes saved for the backward pass."""

    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        student_logprob_NV = _sharded_log_softmax(student_NV.float())
        teacher_logprob_NV = _sharded_log_softmax(teacher_NV.float())
        softmax_NV = student_logprob_NV.exp()
        divergence_N = (softmax_NV * (student_logprob_NV - teacher_logprob_NV)).sum(-1)
        divergence_N = _reduced(divergence_N, dist.ReduceOp.SUM)
        ctx.save_for_backward(softmax_NV, student_logprob_NV, teacher_logprob_NV, divergence_N)
        ctx.dtype = student_NV.dtype
        return divergence_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        softmax_NV, student_logprob_NV, teacher_logprob_NV, divergence_N = ctx.saved_tensors
        gap_NV = student_logprob_NV - teacher_logprob_NV - divergence_N[:, None]
        return gap_NV.mul_(softmax_NV).mul_(grad_N[:, None]).to(ctx.dtype), None


def saved_softmax_reverse_kl(
    student_NV: Tensor, teacher_NV: Tensor, upstream_N: Tensor
) -> tuple[Tensor, Tensor]:
    """A hand-written backward pass from saved softmax and log-probabilities: 5 all-reduces forward, 0 back."""
    student_NV = student_NV.detach().requires_grad_()
    divergence_N = _SavedSoftmax.apply(student_NV, teacher_NV)
    (gradient_NV,) = torch.autograd.grad((divergence_N * upstream_N).sum(), student_NV)
    return divergence_N.detach(), gradient_NV


class _WholeVocabulary(torch.autograd.Function):
    """All shards beside each other, [N, F]; the gradient of this rank's is its slice."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor) -> Tensor:
        ctx.width = logits_NV.shape[1]
        if not dist.is_initialized():
            return logits_NV.view_as(logits_NV)
        shards = [torch.empty_like(logits_NV) for _ in range(dist.get_world_size())]
        dist.all_gather(shards, logits_NV)
        return torch.cat(shards, -1)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> Tensor:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return grad_NF[:, rank * ctx.width : (rank + 1) * ctx.width].contiguous()


def gathered_reverse_kl(student_NV: Tensor, teacher_NV: Tensor, upstream_N: Tensor) -> tuple[Tensor, Tensor]:
    """Both models' logits gathered whole on every rank, then dense autograd: 2 all-gathers of logits forward."""
    student_NV = student_NV.detach().requires_grad_()
    student_logprob_NF = _WholeVocabulary.apply(student_NV).log_softmax(-1, dtype=torch.float32)
    with torch.no_grad():
        teacher_logprob_NF = _WholeVocabulary.apply(teacher_NV).log_softmax(-1, dtype=torch.float32)
    divergence_N = functional.kl_div(
        teacher_logprob_NF, student_logprob_NF, reduction="none", log_target=True
    ).sum(-1)
    (gradient_NV,) = torch.autograd.grad((divergence_N * upstream_N).sum(), student_NV)
    return divergence_N.detach(), gradient_NV


def dense_topk_reverse_kl(
    student_NF: Tensor, teacher_NF: Tensor, upstream_N: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Log-softmax of all logits, the teacher's k best ids, reverse KL of the two renormalised; one rank."""
    student_NF = student_NF.detach().requires_grad_()
    with torch.no_grad():
        teacher_NK, ids_NK = teacher_NF.log_softmax(-1, dtype=torch.float32).topk(k, dim=-1)
        teacher_NK = teacher_NK - teacher_NK.logsumexp(-1, keepdim=True)
    student_NK = student_NF.log_softmax(-1, dtype=torch.float32).gather(-1, ids_NK)
    student_NK = student_NK - student_NK.logsumexp(-1, keepdim=True)
    divergence_N = (student_NK.exp() * (student_NK - teacher_NK)).sum(-1)
    (gradient_NF,) = torch.autograd.grad((divergence_N * upstream_N).sum(), student_NF)
    return divergence_N.detach(), gradient_NF
