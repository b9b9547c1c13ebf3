"""Hidden states and heads for the tests of linear_divergence, and a run of one rank's shard.

Shape suffixes: N tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.objectives import (
    LinearLogits,
    TokenStats,
    linear_divergence,
    reference,
    topk_divergence,
    vocab_parallel_divergence,
)
from tests.objectives.cases import given, known, saved_tensors
from tools.bench.traffic import recorded_traffic


@dataclass
class LinearCase:
    """Whole hidden states [N, D] and heads [V, D] of both models, targets and incoming gradients."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    targets: Tensor
    divergence_grad: Tensor
    logprob_grad: Tensor
    options: dict[str, Any] = field(default_factory=dict)  # of topk_divergence where "support" is among them
    tied: bool = (
        False  # the student's weight is its embedding as well: it adds weight[targets] to its hidden states
    )

    @property
    def topk(self) -> bool:
        return "support" in self.options

    def loss(self, stats: TokenStats) -> Tensor:
        """A loss that reads both differentiable statistics."""
        assert stats.student_logprob is not None
        dtype = stats.divergence.dtype
        return (
            stats.divergence * self.divergence_grad.to(dtype)
            + stats.student_logprob * self.logprob_grad.to(dtype)
        ).sum()

    def truth(self) -> tuple[TokenStats, Tensor, Tensor]:
        """The reference's statistics and gradients of hidden states and head, float64."""
        hidden = self.student_hidden.detach().double().requires_grad_()
        weight = self.student_weight.detach().double().requires_grad_()
        final = hidden + weight[self.targets] if self.tied else hidden
        if self.topk:
            student = final @ weight.T
            teacher = self.teacher_hidden.double() @ self.teacher_weight.double().T
            options = known(reference.topk_divergence, self.options)
            stats = reference.topk_divergence(student, teacher, targets=self.targets, **options)
        else:
            options = known(reference.vocab_parallel_divergence, self.options)
            stats = reference.linear_divergence(
                final, weight, self.teacher_hidden, self.teacher_weight, targets=self.targets, **options
            )
        hidden_grad, weight_grad = torch.autograd.grad(self.loss(stats), (hidden, weight))
        return stats, hidden_grad, weight_grad

    def run(
        self,
        hidden: Tensor,
        weight: Tensor,
        teacher_weight: Tensor,
        group: dist.ProcessGroup | None = None,
        weight_grad: Tensor | None = None,
        **more: Any,
    ) -> TokenStats:
        """The function under test on these shards."""
        options = {"targets": self.targets, "group": group} | self.options | more
        if not self.topk:
            return linear_divergence(
                hidden, weight, self.teacher_hidden, teacher_weight, weight_grad=weight_grad, **options
            )
        student = LinearLogits(hidden, weight, weight_grad)
        return topk_divergence(student, LinearLogits(self.teacher_hidden, teacher_weight), **options)

    def materialised(self, **more: Any) -> tuple[TokenStats, Tensor, Tensor]:
        """What vocab_parallel_divergence says of the same logits held whole, and autograd's gradients."""
        hidden = self.student_hidden.clone().requires_grad_()
        weight = self.student_weight.clone().requires_grad_()
        teacher = self.teacher_hidden @ self.teacher_weight.T
        options = known(vocab_parallel_divergence, self.options) | more
        stats = vocab_parallel_divergence(hidden @ weight.T, teacher, targets=self.targets, **options)
        hidden_grad, weight_grad = torch.autograd.grad(self.loss(stats), (hidden, weight))
        return stats, hidden_grad, weight_grad


def random_linear_case(
    count: int = 12,
    width: int = 48,
    hidden: int = 10,
    teacher_hidden: int = 10,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    tied: bool = False,
    **options: Any,
) -> LinearCase:
    """Rows of different scale; targets within the real vocabulary."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = 10.0 ** torch.linspace(-1, 0.5, max(count, 1), dtype=torch.float64)[:count, None]
    return LinearCase(
        (scale * draw(count, hidden)).to(dtype),
        draw(width, hidden).to(dtype),
        (scale * draw(count, teacher_hidden)).to(dtype),
        draw(width, teacher_hidden).to(dtype),
        torch.randint(options.get("vocab_size", width), (count,), generator=generator),
        draw(count),
        draw(count),
        options,
        tied,
    )


@dataclass
class LinearOutcome:
    """What one rank saw."""

    stats: TokenStats
    hidden_grad: Tensor  # of this rank's hidden states
    weight_grad: Tensor  # of this rank's rows, as autograd has it
    buffer: Tensor | None  # what the weight_grad buffer gained
    forward: list[tuple[str, int]]
    backward: list[tuple[str, int]]
    saved: list[tuple[int, bool]]


def run_linear_shard(case: LinearCase, buffer: float | None = None) -> LinearOutcome:
    """Runs the function on this rank's shards over the WORLD group; `buffer` fills a weight_grad buffer."""
    group, sequence_parallel = dist.group.WORLD, case.options.get("sequence_parallel", False)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    weight = case.student_weight.chunk(ranks)[rank].clone().requires_grad_()
    teacher_weight = case.teacher_weight.chunk(ranks)[rank].clone()
    pieces = ranks if sequence_parallel else 1
    leaf = case.student_hidden.chunk(pieces)[rank % pieces].clone().requires_grad_()
    hidden = leaf
    if case.tied:
        hidden = leaf + _Embedding.apply(weight, case.targets, sequence_parallel)
    weight_grad = None
    if buffer is not None:
        weight_grad = torch.full_like(
            weight, buffer, dtype=torch.promote_types(torch.float32, weight.dtype), requires_grad=False
        )
    with (
        recorded_traffic() as forward,
        saved_tensors(hidden, weight, case.teacher_hidden, teacher_weight) as saved,
    ):
        stats = case.run(hidden, weight, teacher_weight, group, weight_grad)
    with recorded_traffic() as backward:
        case.loss(stats).backward()
    assert leaf.grad is not None and weight.grad is not None
    assert leaf.grad.dtype == leaf.dtype and weight.grad.dtype == weight.dtype
    values = {name: None if value is None else value.detach() for name, value in vars(stats).items()}
    gained = None if weight_grad is None or buffer is None else weight_grad - buffer
    calls = given(forward), given(backward)
    return LinearOutcome(TokenStats(**values), leaf.grad, weight.grad, gained, *calls, saved)  # type: ignore[arg-type]


class _Embedding(torch.autograd.Function):
    """A vocabulary-parallel embedding as Megatron has it: [N, D] on every rank, or [N/TP, D] of this rank."""

    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, tokens_N: Tensor, sequence_parallel: bool) -> Tensor:
        ranks, rank = dist.get_world_size(), dist.get_rank()
        columns_N = tokens_N - rank * weight_VD.shape[0]
        mine_N1 = ((columns_N >= 0) & (columns_N < weight_VD.shape[0]))[:, None]
        columns_N = columns_N.clamp(0, weight_VD.shape[0] - 1)
        ctx.shape, ctx.sequence_parallel = weight_VD.shape, sequence_parallel
        ctx.save_for_backward(columns_N, mine_N1)
        embedded_ND = weight_VD[columns_N] * mine_N1
        dist.all_reduce(embedded_ND)
        return embedded_ND.chunk(ranks)[rank].clone() if sequence_parallel else embedded_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        columns_N, mine_N1 = ctx.saved_tensors
        if ctx.sequence_parallel:
            shards = [torch.empty_like(grad_ND) for _ in range(dist.get_world_size())]
            dist.all_gather(shards, grad_ND.contiguous())
            grad_ND = torch.cat(shards)
        return grad_ND.new_zeros(ctx.shape).index_add(0, columns_N, grad_ND * mine_N1), None, None
