"""From the statistics of every vocabulary shard to those of the whole vocabulary: one gather, one merge.

Shape suffixes: N tokens, R ranks of the tensor-parallel group. See `kernels.statistic_names` for the symbols.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Merged:
    """Statistics of the whole vocabulary, each [N]; None where they were not asked for."""

    student_max: Tensor
    student_sum: Tensor
    teacher_max: Tensor | None = None
    teacher_sum: Tensor | None = None
    mean_gap: Tensor | None = None  # U / Z_s, U the merged reverse_cross
    reverse_kl: Tensor | None = None
    forward_kl: Tensor | None = None
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None

    def student_logprob(self, logit: Tensor) -> Tensor:
        """Log-probabilities of student logits divided by the temperature, [N] or [K, N]."""
        return logit - self.student_max - self.student_sum.log()

    def teacher_logprob(self, logit: Tensor) -> Tensor:
        """Log-probabilities of teacher logits divided by the temperature, [N] or [K, N]."""
        assert self.teacher_max is not None and self.teacher_sum is not None
        return logit - self.teacher_max - self.teacher_sum.log()


def gather_shards(packed: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[rows, N] of this rank -> [R, rows, N]: one all-gather, none where the group has one rank."""
    ranks = 1 if group is None else dist.get_world_size(group)
    if ranks == 1:
        return packed[None]
    gathered = packed.new_empty(ranks, *packed.shape)
    dist.all_gather_into_tensor(gathered.view(ranks * packed.shape[0], -1), packed, group=group)
    return gathered


def merge(rows: dict[str, Tensor]) -> Merged:
    """Online-softmax merge of the shards' statistics [R, N]: every sum moves to the common maximum first."""
    student_max_N = rows["student_max"].amax(0)
    student_shift_RN = rows["student_max"] - student_max_N
    student_scale_RN = student_shift_RN.exp()
    student_sum_N = (student_scale_RN * rows["student_sum"]).sum(0)
    student_entropy_N = _entropy(rows, "student", student_shift_RN, student_sum_N)
    if "teacher_max" not in rows:
        return Merged(student_max_N, student_sum_N, student_entropy=student_entropy_N)
    teacher_max_N = rows["teacher_max"].amax(0)
    teacher_shift_RN = rows["teacher_max"] - teacher_max_N
    teacher_scale_RN = teacher_shift_RN.exp()
    teacher_sum_N = (teacher_scale_RN * rows["teacher_sum"]).sum(0)
    log_sum_ratio_N = student_sum_N.log() - teacher_sum_N.log()
    shift_RN = student_shift_RN - teacher_shift_RN
    reverse_RN = rows["reverse_cross"] + rows["student_sum"] * shift_RN
    mean_gap_N = _weighted_sum(student_scale_RN, reverse_RN) / student_sum_N
    forward_kl_N = None
    if "forward_cross" in rows:
        forward_RN = rows["forward_cross"] - rows["teacher_sum"] * shift_RN
        forward_kl_N = _weighted_sum(teacher_scale_RN, forward_RN) / teacher_sum_N + log_sum_ratio_N
    return Merged(
        student_max_N,
        student_sum_N,
        teacher_max_N,
        teacher_sum_N,
        mean_gap_N,
        mean_gap_N - log_sum_ratio_N,
        forward_kl_N,
        student_entropy_N,
        _entropy(rows, "teacher", teacher_shift_RN, teacher_sum_N),
    )


def _entropy(rows: dict[str, Tensor], model: str, shift_RN: Tensor, sum_N: Tensor) -> Tensor | None:
    if f"{model}_moment" not in rows:
        return None
    moment_RN = rows[f"{model}_moment"] + rows[f"{model}_sum"] * shift_RN
    return sum_N.log() - _weighted_sum(shift_RN.exp(), moment_RN) / sum_N


def _weighted_sum(scale_RN: Tensor, values_RN: Tensor) -> Tensor:
    """Sum over ranks of scale * value, where a scale of 0 silences even an infinite value."""
    return (scale_RN * values_RN).masked_fill(scale_RN == 0, 0.0).sum(0)


def raise_if_not_finite(rows: dict[str, Tensor], divergence_N: Tensor | None, kind: str) -> None:
    """FloatingPointError naming the tensor, from gathered numbers only: every rank raises or none does."""
    problems = []
    for name in ("student", "teacher"):
        if f"{name}_max" not in rows:
            continue
        bad_RN = ~(rows[f"{name}_max"].isfinite() & rows[f"{name}_sum"].isfinite())
        empty_N = (rows[f"{name}_sum"] == 0).all(0)
        if bad_RN.any():
            ranks = bad_RN.any(1).nonzero()[:, 0].tolist()
            problems.append(
                f"{name} logits hold NaN or inf on tensor-parallel ranks {ranks}, {_where(bad_RN.any(0))}"
            )
        elif empty_N.any():
            problems.append(f"{name} logits have no finite value, {_where(empty_N)}")
    if not problems and divergence_N is not None and not divergence_N.isfinite().all():
        one, other = ("student", "teacher") if kind == "forward_kl" else ("teacher", "student")
        problems.append(
            f"{one} logits are -inf where the {other} may draw, {_where(~divergence_N.isfinite())}"
        )
    if problems:
        raise FloatingPointError("; ".join(problems))


def _where(bad_N: Tensor) -> str:
    return f"at {int(bad_N.sum())} of {bad_N.numel()} tokens, first at token {int(bad_N.nonzero()[0, 0])}"
