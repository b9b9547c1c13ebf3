"""Reverse KL over a logits shard in two streaming passes, in plain torch, on any device.

Tokens go through in blocks whose float32 copies stay in the processor's cache, so neither pass makes a
temporary of the size of the logits. Everything is elementwise on differences z - max(z): sums of products in
another order (matrix products) lose two digits in float32.

Shape suffixes: N tokens, V columns of the shard that belong to the real vocabulary, B tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CPU_BLOCK_ELEMENTS = 2**20  # three float32 buffers of 4 MiB stay in a core complex's cache
DEVICE_BLOCK_ELEMENTS = 2**24  # elsewhere only the size of the buffers counts


def statistic_names(targets: bool, entropies: bool) -> tuple[str, ...]:
    """The rows of what `reverse_kl_statistics` returns, in order.

    With z the logits divided by the temperature, m = max z over the shard and Z = sum exp(z - m):
    student_max and student_sum are m_s and Z_s, teacher_max and teacher_sum are m_t and Z_t, cross is
    U = sum exp(z_s - m_s) * ((z_s - m_s) - (z_t - m_t)), student_target and teacher_target are z[target],
    student_moment and teacher_moment are sum exp(z - m) * (z - m), which the entropies need.
    """
    names: tuple[str, ...] = ("student_max", "student_sum", "teacher_max", "teacher_sum", "cross")
    if targets:
        names += ("student_target", "teacher_target")
    if entropies:
        names += ("student_moment", "teacher_moment")
    return names


def reverse_kl_statistics(
    student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor | None, *, temperature: float, entropies: bool
) -> Tensor:
    """The statistics of one shard, [rows of `statistic_names`, N], float64 if either input is, else float32.

    targets_N holds column numbers of this shard and -1 where another shard owns the target; there the target
    rows are -inf. A row without a finite logit, and a shard without columns, has the smallest finite number
    as its maximum and sums of 0, so that merging shards never meets 0 * inf. A column where the student's
    probability is 0 adds 0 to `cross` whatever the teacher says. NaN and +inf logits leave NaN in that
    model's own sum.
    """
    dtype = _statistics_dtype(student_NV, teacher_NV)
    names = statistic_names(targets_N is not None, entropies)
    packed = torch.zeros(len(names), student_NV.shape[0], dtype=dtype, device=student_NV.device)
    rows = dict(zip(names, packed, strict=True))
    if targets_N is not None:
        rows["student_target"].copy_(_at_targets(student_NV, targets_N)).div_(temperature)
        rows["teacher_target"].copy_(_at_targets(teacher_NV, targets_N)).div_(temperature)
    if student_NV.shape[1] == 0:
        rows["student_max"].fill_(torch.finfo(dtype).min)
        rows["teacher_max"].fill_(torch.finfo(dtype).min)
        return packed
    for block, (student_BV, teacher_BV, product_BV) in _blocks(student_NV, dtype, buffers=3):
        _shift_by_max(student_NV[block], student_BV, rows["student_max"][block], temperature)
        _shift_by_max(teacher_NV[block], teacher_BV, rows["teacher_max"][block], temperature)
        torch.exp(student_BV, out=product_BV)
        rows["student_sum"][block] = product_BV.sum(-1)
        if entropies:
            rows["student_moment"][block] = (product_BV * student_BV).nansum(-1)
        # nansum: 0 * inf is the only NaN here that student_sum or teacher_sum does not carry as well.
        product_BV.mul_(student_BV.sub_(teacher_BV))
        rows["cross"][block] = product_BV.nansum(-1)
        torch.exp(teacher_BV, out=product_BV)
        rows["teacher_sum"][block] = product_BV.sum(-1)
        if entropies:
            rows["teacher_moment"][block] = product_BV.mul_(teacher_BV).nansum(-1)
    return packed


def reverse_kl_gradient(
    student_NV: Tensor,
    teacher_NV: Tensor,
    targets_N: Tensor | None,
    *,
    student_max_N: Tensor,
    teacher_max_N: Tensor,
    mean_gap_N: Tensor,
    divergence_scale_N: Tensor,
    logprob_scale_N: Tensor | None,
    target_grad_N: Tensor | None,
    temperature: float,
    out_NV: Tensor,
) -> None:
    """Writes the gradient of one shard into out_NV, which may be student_NV itself.

    With e = exp(z_s - m_s), m and U/Z merged over all shards and mean_gap_N = U/Z_s (which is
    KL + log Z_s - log Z_t):

        out = divergence_scale * e * ((z_s - m_s) - (z_t - m_t) - mean_gap) - logprob_scale * e
              + target_grad at the target's column, where this shard owns it

    The caller puts incoming gradients, 1/Z_s and 1/temperature into the scales. Scales of None drop their
    terms. A column where the student's probability is 0 gets exactly 0 from the first term.
    """
    for block, (weight_BV, gap_BV) in _blocks(student_NV, mean_gap_N.dtype, buffers=2):
        _shift(student_NV[block], weight_BV, student_max_N[block, None], temperature)
        _shift(teacher_NV[block], gap_BV, teacher_max_N[block, None], temperature)
        torch.sub(weight_BV, gap_BV, out=gap_BV)
        gap_BV.sub_(mean_gap_N[block, None])
        weight_BV.exp_()
        gap_BV.mul_(weight_BV).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        if logprob_scale_N is None:
            torch.mul(gap_BV, divergence_scale_N[block, None], out=gap_BV)
        else:
            assert targets_N is not None and target_grad_N is not None
            gap_BV.mul_(divergence_scale_N[block, None]).sub_(weight_BV.mul_(logprob_scale_N[block, None]))
            owned_B1 = targets_N[block, None] >= 0
            gap_BV.scatter_add_(
                1, targets_N[block, None].clamp(min=0), target_grad_N[block, None].where(owned_B1, 0.0)
            )
        out_NV[block] = gap_BV


def _statistics_dtype(student_NV: Tensor, teacher_NV: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (student_NV.dtype, teacher_NV.dtype) else torch.float32


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
    max_B.copy_(logits_BV.amax(-1)).div_(temperature).clamp_(min=torch.finfo(max_B.dtype).min)
    _shift(logits_BV, out_BV, max_B[:, None], temperature)


def _shift(logits_BV: Tensor, out_BV: Tensor, max_B1: Tensor, temperature: float) -> None:
    """out_BV = logits / temperature - max, in the dtype of out_BV."""
    if logits_BV.dtype == out_BV.dtype and temperature == 1.0:
        torch.sub(logits_BV, max_B1, out=out_BV)
        return
    out_BV.copy_(logits_BV)
    if temperature != 1.0:
        out_BV.div_(temperature)
    out_BV.sub_(max_B1)


def _at_targets(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    if logits_NV.shape[1] == 0:
        return logits_NV.new_full((logits_NV.shape[0],), -torch.inf)
    values_N = logits_NV.gather(1, targets_N.clamp(min=0)[:, None])[:, 0]
    return values_N.where(targets_N >= 0, -torch.inf)
