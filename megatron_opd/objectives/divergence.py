"""Divergence of student and teacher over a vocabulary sharded by tensor parallelism: exact, one collective.

Each rank reduces its shard to a few numbers per token; one all-gather and an online-softmax merge give every
rank the divergence, the log-probabilities of the targets and the entropies. The gradient of a shard needs no
more than the merged numbers, so backward is local.

Shape suffixes: N tokens, V columns of the shard that belong to the real vocabulary, R ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_opd.kernels import reverse_kl_gradient, reverse_kl_statistics, statistic_names
from megatron_opd.objectives.stats import TokenStats


def vocab_parallel_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: str = "reverse_kl",
    targets: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    entropies: bool = False,
    check: bool = False,
    inplace_backward: bool = False,
) -> TokenStats:
    """Full-vocabulary divergence and log-probability of `targets` per token, differentiable in the student.

    Reverse KL is KL(p_s || p_t) = sum_v p_s(v) (log p_s(v) - log p_t(v)), p = softmax(logits / temperature);
    its gradient is dz_s = p_s (log p_s - log p_t - KL) / temperature. The teacher is a constant.

    Collectives over `group`: one all-gather forward of 5 numbers per token and rank (7 with targets, 2 more
    with entropies), none backward; none at all without a group or in a group of one. Saved for backward: the
    two logits shards as they are and numbers of size [N]. Statistics are float64 for float64 logits, else
    float32; the gradient has the dtype of the student's logits.

    Args:
        student_logits: [N, width], this rank's shard; any floating dtype. Rank r of the group holds the ids
            r * width to (r + 1) * width - 1.
        teacher_logits: [N, width], the same ids; its dtype may differ.
        kind: "reverse_kl".
        targets: [N] global token ids. An id outside the vocabulary has log-probability -inf.
        temperature: divides both logits; positive.
        vocab_size: number of real ids; ids from here on count as -inf whatever the logits hold. Default: all.
        group: the tensor-parallel group. None: this rank holds the whole vocabulary.
        entropies: also return the entropies of student and teacher, detached.
        check: judge the gathered statistics and raise FloatingPointError on every rank alike, naming the
            tensor, when a logits shard holds NaN or +inf, a token has no finite logit, or the teacher
            excludes an id that the student may draw. Costs one device synchronisation.
        inplace_backward: write the gradient into the storage of student_logits, which must not be used after.

    Raises:
        ValueError: unknown kind, shapes that do not agree, or an option out of range.
    """
    if kind not in _KINDS:
        raise ValueError(f"unknown divergence kind {kind!r}; supported: {', '.join(DIVERGENCE_KINDS)}")
    shard = _Shard.of(student_logits, teacher_logits, targets, temperature, vocab_size, group)
    options = _Options(_KINDS[kind], shard, temperature, group, entropies, check, inplace_backward)
    targets_N = None if targets is None else shard.local_targets(targets.to(student_logits.device))
    return TokenStats(*_VocabParallelDivergence.apply(student_logits, teacher_logits, targets_N, options))


class _Kind(NamedTuple):
    """What is particular to one divergence: its passes over a shard, its value from merged statistics."""

    statistics: Callable[..., Tensor]
    gradient: Callable[..., None]
    value: Callable[[_Merged], Tensor]


def _reverse_kl_value(merged: _Merged) -> Tensor:
    return merged.mean_gap - merged.student_sum.log() + merged.teacher_sum.log()


_KINDS = {"reverse_kl": _Kind(reverse_kl_statistics, reverse_kl_gradient, _reverse_kl_value)}
DIVERGENCE_KINDS = tuple(_KINDS)


class _Options(NamedTuple):
    kind: _Kind
    shard: _Shard
    temperature: float
    group: dist.ProcessGroup | None
    entropies: bool
    check: bool
    inplace_backward: bool


class _Shard(NamedTuple):
    """The part of the real vocabulary that this rank holds."""

    start: int  # global id of the first column
    columns: int  # how many of the columns are real

    @classmethod
    def of(
        cls,
        student_logits: Tensor,
        teacher_logits: Tensor,
        targets: Tensor | None,
        temperature: float,
        vocab_size: int | None,
        group: dist.ProcessGroup | None,
    ) -> _Shard:
        shape = tuple(student_logits.shape)
        if len(shape) != 2 or shape != tuple(teacher_logits.shape):
            raise ValueError(
                f"student and teacher logits must be [N, V/TP] shards of the same ids, not {shape} and "
                f"{tuple(teacher_logits.shape)}"
            )
        if targets is not None and tuple(targets.shape) != shape[:1]:
            raise ValueError(f"targets must have shape {shape[:1]}, not {tuple(targets.shape)}")
        if not temperature > 0.0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        width = shape[1]
        vocab_size = width * ranks if vocab_size is None else vocab_size
        if not 0 < vocab_size <= width * ranks:
            raise ValueError(
                f"vocab_size must be between 1 and {width * ranks} (width of all shards), not {vocab_size}"
            )
        start = rank * width
        return cls(start, min(max(vocab_size - start, 0), width))

    def local_targets(self, targets_N: Tensor) -> Tensor:
        """Column of each target in this shard, -1 where it is not a real id of this shard."""
        local_N = targets_N - self.start
        return local_N.where((local_N >= 0) & (local_N < self.columns), -1)


class _VocabParallelDivergence(torch.autograd.Function):
    """Forward: statistics, one all-gather, merge. Backward: one local pass."""

    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, teacher_logits: Tensor, targets_N: Tensor | None, options: _Options
    ) -> tuple[Tensor | None, ...]:
        names = statistic_names(targets_N is not None, options.entropies)
        columns = options.shard.columns
        packed = options.kind.statistics(
            student_logits[:, :columns],
            teacher_logits[:, :columns],
            targets_N,
            temperature=options.temperature,
            entropies=options.entropies,
        )
        rows = dict(zip(names, _gather(packed, options.group).unbind(1), strict=True))
        merged = _merge(rows)
        divergence_N = options.kind.value(merged)
        if options.check:
            _raise_if_not_finite(rows, divergence_N)
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            student_logits,
            teacher_logits,
            targets_N,
            torch.stack(
                (merged.student_max, merged.student_sum, merged.teacher_max, merged.mean_gap, divergence_N)
            ),
        )
        student_logprob, teacher_logprob = merged.student_logprob, merged.teacher_logprob
        constants = (teacher_logprob, merged.student_entropy, merged.teacher_entropy)
        ctx.mark_non_differentiable(*(constant for constant in constants if constant is not None))
        return divergence_N, student_logprob, *constants

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, divergence_grad_N: Tensor | None, logprob_grad_N: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        student_logits, teacher_logits, targets_N, merged = ctx.saved_tensors
        student_max_N, student_sum_N, teacher_max_N, mean_gap_N, divergence_N = merged
        options: _Options = ctx.options
        columns = options.shard.columns
        if divergence_grad_N is None:
            divergence_grad_N = torch.zeros_like(divergence_N)
        divergence_scale_N = divergence_grad_N / (student_sum_N * options.temperature)
        logprob_scale_N = target_grad_N = None
        if logprob_grad_N is not None:
            target_grad_N = logprob_grad_N / options.temperature
            logprob_scale_N = target_grad_N / student_sum_N
        # detach() keeps the version counter: autograd notices if anyone else still needed the logits.
        out = student_logits.detach() if options.inplace_backward else torch.empty_like(student_logits)
        options.kind.gradient(
            student_logits.detach()[:, :columns],
            teacher_logits[:, :columns],
            targets_N,
            student_max_N=student_max_N,
            teacher_max_N=teacher_max_N,
            mean_gap_N=mean_gap_N,
            # A token without a value must not get a gradient that looks sound.
            divergence_scale_N=divergence_scale_N.where(~divergence_N.isnan(), torch.nan),
            logprob_scale_N=logprob_scale_N,
            target_grad_N=target_grad_N,
            temperature=options.temperature,
            out_NV=out[:, :columns],
        )
        out[:, columns:] = 0
        return out, None, None, None


@dataclass(frozen=True)
class _Merged:
    """Statistics of the whole vocabulary, each [N]; see `kernels.statistic_names` for the symbols."""

    student_max: Tensor
    student_sum: Tensor
    teacher_max: Tensor
    teacher_sum: Tensor
    mean_gap: Tensor  # U / Z_s
    student_logprob: Tensor | None
    teacher_logprob: Tensor | None
    student_entropy: Tensor | None
    teacher_entropy: Tensor | None


def _gather(packed: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[rows, N] of this rank -> [R, rows, N]."""
    ranks = 1 if group is None else dist.get_world_size(group)
    if ranks == 1:
        return packed[None]
    gathered = packed.new_empty(ranks, *packed.shape)
    dist.all_gather_into_tensor(gathered.view(ranks * packed.shape[0], -1), packed, group=group)
    return gathered


def _merge(rows: dict[str, Tensor]) -> _Merged:
    """Online-softmax merge of the shards' statistics [R, N]: every sum moves to the common maximum first."""
    student_max_N, teacher_max_N = rows["student_max"].amax(0), rows["teacher_max"].amax(0)
    student_shift_RN = rows["student_max"] - student_max_N
    teacher_shift_RN = rows["teacher_max"] - teacher_max_N
    student_scale_RN, teacher_scale_RN = student_shift_RN.exp(), teacher_shift_RN.exp()
    student_sum_N = (student_scale_RN * rows["student_sum"]).sum(0)
    teacher_sum_N = (teacher_scale_RN * rows["teacher_sum"]).sum(0)
    cross_RN = rows["cross"] + rows["student_sum"] * (student_shift_RN - teacher_shift_RN)
    logprobs: tuple[Tensor | None, Tensor | None] = (None, None)
    entropies: tuple[Tensor | None, Tensor | None] = (None, None)
    if "student_target" in rows:
        logprobs = (
            rows["student_target"].amax(0) - student_max_N - student_sum_N.log(),
            rows["teacher_target"].amax(0) - teacher_max_N - teacher_sum_N.log(),
        )
    if "student_moment" in rows:
        student_moment_RN = rows["student_moment"] + rows["student_sum"] * student_shift_RN
        teacher_moment_RN = rows["teacher_moment"] + rows["teacher_sum"] * teacher_shift_RN
        entropies = (
            student_sum_N.log() - _weighted_sum(student_scale_RN, student_moment_RN) / student_sum_N,
            teacher_sum_N.log() - _weighted_sum(teacher_scale_RN, teacher_moment_RN) / teacher_sum_N,
        )
    mean_gap_N = _weighted_sum(student_scale_RN, cross_RN) / student_sum_N
    return _Merged(
        student_max_N, student_sum_N, teacher_max_N, teacher_sum_N, mean_gap_N, *logprobs, *entropies
    )


def _weighted_sum(scale_RN: Tensor, values_RN: Tensor) -> Tensor:
    """Sum over ranks of scale * value, where a scale of 0 silences even an infinite value."""
    return (scale_RN * values_RN).masked_fill(scale_RN == 0, 0.0).sum(0)


def _raise_if_not_finite(rows: dict[str, Tensor], divergence_N: Tensor) -> None:
    """FloatingPointError naming the tensor, from gathered numbers only: every rank raises or none does."""
    problems = []
    for name in ("student", "teacher"):
        bad_RN = ~(rows[f"{name}_max"].isfinite() & rows[f"{name}_sum"].isfinite())
        empty_N = (rows[f"{name}_sum"] == 0).all(0)
        if bad_RN.any():
            ranks = bad_RN.any(1).nonzero()[:, 0].tolist()
            problems.append(
                f"{name} logits hold NaN or inf on tensor-parallel ranks {ranks}, {_where(bad_RN.any(0))}"
            )
        elif empty_N.any():
            problems.append(f"{name} logits have no finite value, {_where(empty_N)}")
    if not problems and not divergence_N.isfinite().all():
        problems.append(
            f"teacher logits are -inf where the student may draw, {_where(~divergence_N.isfinite())}"
        )
    if problems:
        raise FloatingPointError("; ".join(problems))


def _where(bad_N: Tensor) -> str:
    return f"at {int(bad_N.sum())} of {bad_N.numel()} tokens, first at token {int(bad_N.nonzero()[0, 0])}"
