"""What all vocabulary-parallel objectives share: statistics of every shard, one gather, gradients without another.

`compare` is the one differentiable function behind `divergence`, `linear_divergence` and `topk`. Forward
(`shard_statistics`): one streaming pass over each shard, one all-gather, a merge that gives every rank the same
numbers per token. Backward (`shard_gradient`): one local pass per shard. Logits that are given as hidden states
and a head shard are computed chunk by chunk, in both passes, and never exist as a whole.

Shape suffixes: N tokens, D hidden size, K ids of a support.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_opd.objectives.kept_ids import KeptIds
from megatron_opd.objectives.logits import HeadGradient, LinearLogits, LogitsPair
from megatron_opd.objectives.merge import merge, raise_if_not_finite
from megatron_opd.objectives.shard import Request, Shard
from megatron_opd.objectives.shard_gradient import Points, gradient_rows, write_gradient
from megatron_opd.objectives.shard_statistics import divergence_of, support_of, whole_statistics


class Compared(NamedTuple):
    """Numbers per token, [N] or [N, K]; None where they were not asked for or cannot be known."""

    divergence: Tensor | None  # differentiable
    student_logprob: Tensor | None  # differentiable
    ids_student_logprob: Tensor | None  # [N, K], differentiable; -inf where the id is absent
    teacher_logprob: Tensor | None
    reverse_kl: Tensor | None
    student_entropy: Tensor | None
    teacher_entropy: Tensor | None
    ids: Tensor | None  # [N, K] global ids, -1 where absent
    ids_teacher_logprob: Tensor | None  # [N, K]


def compare(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits | None,
    targets_N: Tensor | None,
    ids_NK: Tensor | None,
    request: Request,
) -> Compared:
    """Compare two models' distributions at N tokens; see `Compared` and the functions that are built on it.

    ids_NK are global ids whose log-probabilities are wanted (-1: absent, as are those outside
    the vocabulary); request.best_of finds them instead.
    Collectives: one all-gather forward (two for jsd). Saved: the inputs as they are, numbers of size [N] and
    [N, K], and with sequence_parallel the gathered hidden states.
    """
    shard = Shard.of(student, teacher, targets_N, request)
    student_tensor, student_weight, weight_grad = _parts(student)
    teacher_tensor, teacher_weight, _ = _parts(teacher)
    if targets_N is not None:
        targets_N = targets_N.to(student_tensor.device)
    if ids_NK is not None:
        if ids_NK.dim() != 2 or ids_NK.shape[0] != shard.tokens:
            raise ValueError(f"ids must have shape [{shard.tokens}, K], not {tuple(ids_NK.shape)}")
        ids_NK = ids_NK.to(student_tensor.device, torch.int64).masked_fill(ids_NK >= shard.vocab_size, -1)
    work = _Work(shard, request, weight_grad)
    return Compared(
        *_Compare.apply(
            student_tensor, student_weight, teacher_tensor, teacher_weight, targets_N, ids_NK, work
        )
    )


def sampled_logprob(
    logits: Tensor | LinearLogits,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
    kept: KeptIds | None = None,
) -> Tensor:
    """Log-probability [N] of `targets` under one model, differentiable; options as `vocab_parallel_divergence`.

    One all-gather forward of 3 numbers per token and rank; backward none, for LinearLogits one all-reduce [N, D].
    """
    request = Request(
        temperature=temperature, vocab_size=vocab_size, group=group, chunk_size=chunk_size, kept=kept
    )
    student_logprob_N = compare(logits, None, targets, None, request).student_logprob
    assert student_logprob_N is not None
    return student_logprob_N


def likeliest(
    logits: Tensor | LinearLogits,
    k: int,
    *,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """The `k` likeliest ids [N, K] int64 of one model, likeliest first; options as `vocab_parallel_divergence`.

    One all-gather of 2 + 2 K numbers per token and rank.
    """
    request = Request(vocab_size=vocab_size, group=group, chunk_size=chunk_size, best_of="student", k=k)
    ids_NK = compare(logits, None, None, None, request).ids
    assert ids_NK is not None
    return ids_NK


def _parts(logits: Tensor | LinearLogits | None) -> tuple[Any, Tensor | None, Tensor | None]:
    if isinstance(logits, LinearLogits):
        return logits.hidden, logits.weight, logits.weight_grad
    return logits, None, None


class _Work(NamedTuple):
    shard: Shard
    request: Request
    weight_grad: Tensor | None


class _Compare(torch.autograd.Function):
    """Forward: statistics, one gather, merge. Backward: one local pass."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_weight: Tensor | None,
        teacher: Tensor | None,
        teacher_weight: Tensor | None,
        targets_N: Tensor | None,
        ids_NK: Tensor | None,
        work: _Work,
    ) -> tuple[Tensor | None, ...]:
        """The fields of `Compared`, in order."""
        shard, request, _ = work
        if request.sequence_parallel:
            student = _gather_tokens(student, work)
        left_out = shard.left_out(request.kept)
        models = LogitsPair.of(student, student_weight, teacher, teacher_weight, left_out)
        rows = whole_statistics(models, targets_N, ids_NK, shard, request)
        merged = merge(rows)
        divergence_N, center_N = divergence_of(models, merged, shard, request)
        if request.check:
            raise_if_not_finite(rows, divergence_N, request.kind)
        ids_NK, student_ids_KN, teacher_ids_KN = support_of(rows, ids_NK, request)
        ctx.work = work
        ctx.set_materialize_grads(False)
        inputs = (student, student_weight, teacher, teacher_weight, targets_N, ids_NK)
        sums = (merged.student_max, merged.student_sum, merged.teacher_max, merged.teacher_sum)
        ctx.save_for_backward(*inputs, divergence_N, center_N, *sums)
        constants = (
            merged.teacher_logprob(rows["teacher_target"].amax(0)) if "teacher_target" in rows else None,
            merged.reverse_kl,
            merged.student_entropy,
            merged.teacher_entropy,
            ids_NK,
            None if teacher_ids_KN is None else merged.teacher_logprob(teacher_ids_KN).t(),
        )
        ctx.mark_non_differentiable(*(constant for constant in constants if constant is not None))
        return (
            divergence_N,
            merged.student_logprob(rows["student_target"].amax(0)) if "student_target" in rows else None,
            None if student_ids_KN is None else merged.student_logprob(student_ids_KN).t(),
            *constants,
        )

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        divergence_grad_N: Tensor | None,
        target_grad_N: Tensor | None,
        ids_grad_NK: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the student's logits, or of its hidden states and head; None for the other inputs."""
        student, student_weight, teacher, teacher_weight, targets_N, ids_NK, *numbers = ctx.saved_tensors
        work: _Work = ctx.work
        shard, request, weight_grad = work
        points = Points.of(targets_N, ids_NK, target_grad_N, ids_grad_NK, shard, request)
        kind = request.kind if divergence_grad_N is not None else "logprob"
        rows = gradient_rows(kind, divergence_grad_N, points, numbers, request)
        if kind == "logprob":
            teacher = None  # not read, and where it is a product not computed
        # detach() keeps the version counter: autograd notices if anyone else still needed the logits.
        left_out = shard.left_out(request.kept)
        models = LogitsPair.of(student.detach(), student_weight, teacher, teacher_weight, left_out)
        head = out = None
        if student_weight is None:
            out = student.detach() if request.inplace_backward else torch.empty_like(student)
        else:
            frozen = not ctx.needs_input_grad[1]
            head = HeadGradient(student, student_weight, weight_grad, request.chunk_size, frozen=frozen)
        for tokens, student_CV, teacher_CV in models.chunks(request.chunk_size):
            out_CV = student_CV if out is None else out[tokens]
            write_gradient(kind, student_CV, teacher_CV, out_CV, tokens, rows, points, shard, request)
            if head is not None:
                head.add(tokens, out_CV)
        if head is None:
            return out, None, None, None, None, None, None
        return _complete(head.hidden_grad_ND, work), head.weight_gradient(), None, None, None, None, None


def _gather_tokens(hidden: Tensor, work: _Work) -> Tensor:
    """The hidden states of all tokens from every rank's share: one all-gather."""
    if work.shard.ranks == 1:
        return hidden
    hidden_ND = hidden.new_empty(hidden.shape[0] * work.shard.ranks, hidden.shape[1])
    dist.all_gather_into_tensor(hidden_ND, hidden.contiguous(), group=work.request.group)
    return hidden_ND


def _complete(hidden_grad_ND: Tensor, work: _Work) -> Tensor:
    """Sum over the vocabulary shards: one all-reduce, or one reduce-scatter to this rank's tokens."""
    ranks, request = work.shard.ranks, work.request
    if ranks == 1:
        return hidden_grad_ND
    if not request.sequence_parallel:
        dist.all_reduce(hidden_grad_ND, group=request.group)
        return hidden_grad_ND
    mine = hidden_grad_ND.new_empty(hidden_grad_ND.shape[0] // ranks, hidden_grad_ND.shape[1])
    dist.reduce_scatter_tensor(mine, hidden_grad_ND, group=request.group)
    return mine
