"""The numbers of `megatron_opd.kernels` written down densely, in float64: what its implementations must give."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_opd.kernels import GradientRows, statistic_names

SCALES = (  # of GradientRows in order: for the random rows of `random_rows`, any finite numbers do
    (3.0, 5.0),
    (-1.0, 1.0),
    (-1.0, 1.0),
    (2.0, 6.0),
    (-2.0, 2.0),
    (-1.0, 1.0),
    (-3.0, 3.0),
)


def expectation(weight_NV: Tensor, value_NV: Tensor) -> Tensor:
    """sum of weight * value; a weight of 0 silences even an infinite value."""
    return (weight_NV * value_NV.where(weight_NV > 0, 0.0)).sum(-1)


def shifted(logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """z - m and m in float64, m finite below as float32 has it where the logits are not float64."""
    z_NV = logits_NV.double() / temperature
    lowest = torch.finfo(torch.promote_types(logits_NV.dtype, torch.float32)).min
    max_N = z_NV.amax(-1) if z_NV.shape[1] else z_NV.new_full((len(z_NV),), -torch.inf)
    max_N = max_N.clamp(min=lowest)
    return z_NV - max_N[:, None], max_N


def statistics(student: Tensor, teacher: Tensor, temperature: float) -> dict[str, Tensor]:
    """Every statistic by name, float64 [N]."""
    a, student_max = shifted(student, temperature)
    b, teacher_max = shifted(teacher, temperature)
    numbers = {
        "student_max": student_max,
        "student_sum": a.exp().sum(-1),
        "teacher_max": teacher_max,
        "teacher_sum": b.exp().sum(-1),
        "reverse_cross": expectation(a.exp(), a - b),
        "forward_cross": expectation(b.exp(), b - a),
        "student_moment": expectation(a.exp(), a),
        "teacher_moment": expectation(b.exp(), b),
    }
    assert tuple(numbers) == statistic_names(forward_cross=True, entropies=True)
    return numbers


def log_to_mixture(ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(p_s / mix) and log(p_t / mix), by way of p_t / p_s = exp(ratio)."""
    return -(beta * ratio.exp() + 1 - beta).log(), -(beta + (1 - beta) * (-ratio).exp()).log()


def jsd_statistics(
    student: Tensor, teacher: Tensor, rows: GradientRows, beta: float, temperature: float
) -> Tensor:
    """[2, N], with the maxima and log_sum_ratio that `rows` has."""
    a, b, ratio = _given(student, teacher, rows, temperature)
    logs = log_to_mixture(ratio, beta)
    return torch.stack([expectation(a.exp(), logs[0]), expectation(b.exp(), logs[1])])


def gradient(
    kind: str, student: Tensor, teacher: Tensor | None, rows: GradientRows, beta: float, temperature: float
) -> Tensor:
    """The gradient [N, V] of one kind, float64; rows of None are 0."""
    teacher = student if teacher is None else teacher
    a, b, ratio = _given(student, teacher, rows, temperature)
    scale, logprob, center, teacher_scale = (
        torch.zeros(len(a), 1, dtype=torch.float64, device=a.device) if row is None else row.double()[:, None]
        for row in (rows.divergence_scale, rows.logprob_scale, rows.center, rows.teacher_scale)
    )
    if kind in ("logprob", "forward_kl"):
        moved = b.exp() * teacher_scale if kind == "forward_kl" else 0.0
        return a.exp() * (scale - logprob) - moved
    term = a - b if kind == "reverse_kl" else log_to_mixture(ratio, beta)[0]
    return a.exp() * (scale * (term - center).where(a.exp() > 0, 0.0) - logprob)


def random_rows(count: int, like: Tensor) -> GradientRows:
    """Rows with a number everywhere, [count], in the dtype that the implementations compute `like` in."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    generator = torch.Generator().manual_seed(count)
    return GradientRows(
        *(
            (low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)).to(
                like.device, dtype
            )
            for low, high in SCALES
        )
    )


def _given(
    student: Tensor, teacher: Tensor, rows: GradientRows, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits less the given maxima, and the log-ratio of the models' probabilities."""

    def column(row: Tensor | None) -> Tensor:
        return (
            torch.zeros(len(student), 1, dtype=torch.float64, device=student.device)
            if row is None
            else row.double()[:, None]
        )

    a = student.double() / temperature - column(rows.student_max)
    b = teacher.double() / temperature - column(rows.teacher_max)
    return a, b, b - a + column(rows.log_sum_ratio)
