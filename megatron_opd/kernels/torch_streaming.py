"""Statistics and gradients of divergences over a logits shard in streaming passes, in plain torch, on any device.

Tokens go through in blocks whose float32 copies stay in the processor's cache, so no pass makes a temporary of
the size of the logits. Everything is elementwise on differences z - max(z): sums of products in another order
(matrix products) lose two digits in float32.

Symbols: z = logits / temperature; m = max z and Z = sum exp(z - m) over the shard (merged over all shards where
the names say so); p = softmax; suffixes s and t for student and teacher. Shape suffixes: N tokens, V columns of
the shard that belong to the real vocabulary, B tokens of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

CPU_BLOCK_ELEMENTS = 2**20  # three float32 buffers of 4 MiB stay in a core complex's cache
DEVICE_BLOCK_ELEMENTS = 2**24  # elsewhere only the size of the buffers counts

LOG2_E = 1.0 / math.log(2.0)


def statistic_names(
    *, teacher: bool = True, forward_cross: bool = False, entropies: bool = False
) -> tuple[str, ...]:
    """The rows of what `statistics` returns, in order.

    student_max and student_sum are m_s and Z_s, teacher_max and teacher_sum m_t and Z_t; reverse_cross is
    sum exp(z_s - m_s) * ((z_s - m_s) - (z_t - m_t)), forward_cross the same with the models exchanged; the
    moments sum exp(z - m) * (z - m) are what entropies need.
    """
    names: tuple[str, ...] = ("student_max", "student_sum")
    if teacher:
        names += ("teacher_max", "teacher_sum", "reverse_cross")
    if forward_cross:
        names += ("forward_cross",)
    if entropies:
        names += ("student_moment", "teacher_moment") if teacher else ("student_moment",)
    return names


def statistics(
    student_NV: Tensor,
    teacher_NV: Tensor | None,
    *,
    temperature: float,
    forward_cross: bool = False,
    entropies: bool = False,
) -> Tensor:
    """The statistics of one shard, [rows of `statistic_names`, N], float64 if either input is, else float32.

    A row without a finite logit, and a shard without columns, has the smallest finite number as its maximum
    and sums of 0, so that merging shards never meets 0 * inf. A column where a model's probability is 0 adds
    0 to the sums over that model whatever the other says. NaN and +inf logits leave NaN in that model's own
    sum.
    """
    dtype = _statistics_dtype(student_NV, teacher_NV)
    names = statistic_names(teacher=teacher_NV is not None, forward_cross=forward_cross, entropies=entropies)
    packed = torch.zeros(len(names), student_NV.shape[0], dtype=dtype, device=student_NV.device)
    rows = dict(zip(names, packed, strict=True))
    if student_NV.shape[1] == 0:
        for name in ("student_max", "teacher_max"):
            if name in rows:
                rows[name].fill_(torch.finfo(dtype).min)
        return packed
    for block, (student_BV, teacher_BV, product_BV) in _blocks(student_NV, dtype, buffers=3):
        here = {name: row[block] for name, row in rows.items()}
        _shift_by_max(student_NV[block], student_BV, here["student_max"], temperature)
        _exp(student_BV, out=product_BV)
        here["student_sum"].copy_(product_BV.sum(-1))
        if entropies:
            here["student_moment"].copy_((product_BV * student_BV).nansum(-1))
        if teacher_NV is not None:
            _shift_by_max(teacher_NV[block], teacher_BV, here["teacher_max"], temperature)
            _teacher_statistics(here, student_BV, teacher_BV, product_BV)
    return packed


def _teacher_statistics(
    rows: dict[str, Tensor], student_BV: Tensor, teacher_BV: Tensor, product_BV: Tensor
) -> None:
    """The rows that need both models' shifted logits; product_BV comes in as exp(student_BV)."""
    # nansum: 0 * inf is the only NaN here that student_sum or teacher_sum does not carry as well.
    gap_BV = student_BV.sub_(teacher_BV)
    rows["reverse_cross"].copy_(product_BV.mul_(gap_BV).nansum(-1))
    _exp(teacher_BV, out=product_BV)
    rows["teacher_sum"].copy_(product_BV.sum(-1))
    if "teacher_moment" in rows:
        rows["teacher_moment"].copy_((teacher_BV.mul_(product_BV)).nansum(-1))
    if "forward_cross" in rows:
        rows["forward_cross"].copy_(product_BV.mul_(gap_BV).nansum(-1)).neg_()


def jsd_statistics(
    student_NV: Tensor,
    teacher_NV: Tensor,
    *,
    student_max_N: Tensor,
    teacher_max_N: Tensor,
    log_sum_ratio_N: Tensor,
    beta: float,
    temperature: float,
) -> Tensor:
    """This shard's part of the two sums of the generalised Jensen-Shannon divergence, [2, N].

    With mix = beta * p_t + (1 - beta) * p_s: sum exp(z_s - m_s) * log(p_s / mix) and
    sum exp(z_t - m_t) * log(p_t / mix), m and log_sum_ratio = log Z_s - log Z_t merged over all shards.
    """
    packed = torch.zeros(2, student_NV.shape[0], dtype=student_max_N.dtype, device=student_NV.device)
    for block, (student_BV, teacher_BV, ratio_BV) in _blocks(student_NV, packed.dtype, buffers=3):
        _shift(student_NV[block], student_BV, student_max_N[block, None], temperature)
        _shift(teacher_NV[block], teacher_BV, teacher_max_N[block, None], temperature)
        torch.sub(teacher_BV, student_BV, out=ratio_BV).add_(log_sum_ratio_N[block, None])
        student_log_BV, teacher_log_BV = _log_to_mixture(ratio_BV, beta)
        packed[0, block] = _exp(student_BV, out=student_BV).mul_(student_log_BV).nansum(-1)
        packed[1, block] = _exp(teacher_BV, out=teacher_BV).mul_(teacher_log_BV).nansum(-1)
    return packed


class GradientRows(NamedTuple):
    """Numbers per token, each [N], that `gradient` combines with the logits; None where a kind reads none."""

    student_max: Tensor  # merged over all shards, as is teacher_max
    divergence_scale: Tensor | None = None
    logprob_scale: Tensor | None = None
    teacher_max: Tensor | None = None
    center: Tensor | None = None
    teacher_scale: Tensor | None = None
    log_sum_ratio: Tensor | None = None

    def at(self, tokens: Any) -> GradientRows:
        """The rows of some of the tokens."""
        student_max, *others = (None if row is None else row[tokens] for row in self)
        assert student_max is not None
        return GradientRows(student_max, *others)


def gradient(
    student_NV: Tensor,
    teacher_NV: Tensor | None,
    *,
    kind: str,
    rows: GradientRows,
    temperature: float,
    beta: float = 0.5,
    out_NV: Tensor,
) -> None:
    """Writes the gradient with respect to one shard's student logits into out_NV, which may be student_NV.

    With e = exp(z - m), scales as in `rows` (a logprob_scale of None is 0):

        reverse_kl: e_s * (divergence_scale * ((z_s - m_s) - (z_t - m_t) - center) - logprob_scale)
        jsd:        e_s * (divergence_scale * (log(p_s / mix) - center) - logprob_scale)
        forward_kl: e_s * (divergence_scale - logprob_scale) - e_t * teacher_scale
        logprob:    -e_s * logprob_scale

    The caller puts incoming gradients, 1/Z and 1/temperature into the scales, and adds what falls on single
    ids. A column where the student's probability is 0 gets exactly 0 from the terms in e_s.
    """
    for block, (weight_BV, other_BV) in _blocks(student_NV, rows.student_max.dtype, buffers=2):
        here = rows.at(block).at((slice(None), None))
        _shift(student_NV[block], weight_BV, here.student_max, temperature)
        if teacher_NV is not None:
            assert here.teacher_max is not None
            _shift(teacher_NV[block], other_BV, here.teacher_max, temperature)
        out_NV[block] = _combine(kind, weight_BV, other_BV, here, beta)


def _combine(kind: str, student_BV: Tensor, teacher_BV: Tensor, rows: GradientRows, beta: float) -> Tensor:
    """The formulas of `gradient` on shifted logits, which are overwritten."""
    if kind in ("logprob", "forward_kl"):
        scale_B1 = torch.zeros_like(rows.student_max)
        scale_B1 = scale_B1 if rows.divergence_scale is None else scale_B1 + rows.divergence_scale
        scale_B1 = scale_B1 if rows.logprob_scale is None else scale_B1 - rows.logprob_scale
        out_BV = _exp(student_BV, out=student_BV).mul_(scale_B1)
        if kind == "logprob":
            return out_BV
        assert rows.teacher_scale is not None
        return out_BV.sub_(teacher_BV.exp_().mul_(rows.teacher_scale))
    if kind == "reverse_kl":
        term_BV = torch.sub(student_BV, teacher_BV, out=teacher_BV)
    else:
        assert kind == "jsd" and rows.log_sum_ratio is not None
        ratio_BV = torch.sub(teacher_BV, student_BV, out=teacher_BV).add_(rows.log_sum_ratio)
        term_BV = _log_to_mixture(ratio_BV, beta)[0]
    assert rows.center is not None and rows.divergence_scale is not None
    term_BV.sub_(rows.center)
    weight_BV = _exp(student_BV, out=student_BV)
    term_BV.mul_(weight_BV).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    term_BV.mul_(rows.divergence_scale)
    return term_BV if rows.logprob_scale is None else term_BV.sub_(weight_BV.mul_(rows.logprob_scale))


def _log_to_mixture(ratio_BV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(p_s / mix) and log(p_t / mix) from log(p_t / p_s), which is overwritten; no overflow either way."""
    # mix / p_s = beta e^r + (1 - beta): the logarithm of a sum of two exponentials.
    first_BV = torch.logaddexp(ratio_BV + math.log(beta), ratio_BV.new_tensor(math.log1p(-beta))).neg_()
    # +inf - inf, where the student's probability is 0: the teacher's share of the mixture is beta.
    second_BV = ratio_BV.add_(first_BV).nan_to_num_(nan=-math.log(beta), posinf=torch.inf, neginf=-torch.inf)
    return first_BV, second_BV


def _statistics_dtype(student_NV: Tensor, teacher_NV: Tensor | None) -> torch.dtype:
    dtypes = (student_NV.dtype, student_NV.dtype if teacher_NV is None else teacher_NV.dtype)
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _blocks(like_NV: Tensor, dtype: torch.dtype, buffers: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of tokens, each with `buffers` scratch tensors of its shape, whose memory is used again."""
    count, width = like_NV.shape
    if count == 0 or width == 0:
        return
    elements = CPU_BLOCK_ELEMENTS if like_NV.device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    size = min(count, max(1, elements // width))
    scratch = torch.empty(buffers, size, width, dtype=dtype, device=like_NV.device)
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield slice(start, stop), scratch[:, : stop - start]


def _shift_by_max(logits_BV: Tensor, out_BV: Tensor, max_B: Tensor, temperature: float) -> None:
    """max_B = max of logits / temperature, kept finite below; out_BV = logits / temperature - max_B."""
    scaled_BV = _scaled(logits_BV, out_BV, temperature)
    max_B.copy_(scaled_BV.amax(-1)).clamp_(min=torch.finfo(max_B.dtype).min)
    torch.sub(scaled_BV, max_B[:, None], out=out_BV)


def _shift(logits_BV: Tensor, out_BV: Tensor, max_B1: Tensor, temperature: float) -> None:
    """out_BV = logits / temperature - max, in the dtype of out_BV."""
    torch.sub(_scaled(logits_BV, out_BV, temperature), max_B1, out=out_BV)


def _scaled(logits_BV: Tensor, out_BV: Tensor, temperature: float) -> Tensor:
    """logits / temperature in the dtype of out_BV: the logits themselves, or out_BV."""
    if logits_BV.dtype == out_BV.dtype and temperature == 1.0:
        return logits_BV
    out_BV.copy_(logits_BV)
    return out_BV if temperature == 1.0 else out_BV.div_(temperature)


def _exp(values_BV: Tensor, *, out: Tensor) -> Tensor:
    """exp(values) in `out`, which may be values_BV: by exp2, which torch vectorises better on many processors."""
    return torch.mul(values_BV, LOG2_E, out=out).exp2_()
