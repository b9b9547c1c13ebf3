# mypy: disallow-untyped-defs=False
"""The Triton kernels that `triton_streaming` launches: one program walks one token's row of the shard in tiles.

Each gets the logits as a pointer to the first row and the distance between rows, and float32 or float64 numbers
per token; it computes in DTYPE. Temperature and beta are compiled in: float arguments of a kernel would be
rounded to float32. A model's sums are relative to its largest logit so far (online softmax). The formulas are
those of `torch_streaming`; a = z_s - m_s, b = z_t - m_t.

Shape suffixes: N tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(row, offsets, columns, TEMPERATURE: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of logits / temperature; -inf, which is probability 0, beyond the last column."""
    logits = tl.load(row + offsets, mask=offsets < columns, other=-float("inf")).to(DTYPE)
    if TEMPERATURE != 1.0:
        logits = logits * (1.0 / TEMPERATURE)
    return logits


@triton.jit
def _exp(x):
    """exp; in float32 by way of 2**x, which unlike tl.exp rounds denormal results to 0: half the instructions."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * 1.4426950408889634)  # log2(e)


@triton.jit
def _expectation(weights, values):
    """sum of weights * values; a weight of 0 silences even an infinite value."""
    return tl.sum(weights * tl.where(weights > 0, values, 0.0), 0)


@triton.jit
def _move(total, weight, scale, shift):
    """A sum of exp(x - m) * (y - n) after m moved by log(scale) and y - n by shift; weight is sum exp(x - m).

    Where all old weights are 0, or become so, the sum is 0 however far n moved.
    """
    return tl.where(weight * scale > 0, scale * (total + weight * shift), 0.0)


@triton.jit
def _log_to_mixture(ratio, BETA: tl.constexpr):
    """log(p_s / mix) and log(p_t / mix) from ratio = log(p_t / p_s), which may be infinite."""
    small = _exp(-tl.abs(ratio))
    share = tl.where(ratio > 0, BETA + (1 - BETA) * small, BETA * small + (1 - BETA))
    log_share = tl.log(share)
    return -tl.maximum(ratio, 0.0) - log_share, tl.minimum(ratio, 0.0) - log_share


@triton.jit
def _empty(LOWEST: tl.constexpr, DTYPE: tl.constexpr):
    """The maximum of no logits, and two sums over none."""
    return tl.full((), LOWEST, DTYPE), tl.full((), 0.0, DTYPE), tl.full((), 0.0, DTYPE)


@triton.jit
def _advance(maximum, tile):
    """What one more tile changes: the maximum, how far it moved (<= 0), exp of that, tile - maximum, exp of that."""
    higher = tl.maximum(maximum, tl.max(tile, 0))
    shift = maximum - higher
    tile -= higher
    return higher, shift, _exp(shift), tile, _exp(tile)


@triton.jit
def _store_row(packed, value):
    """Writes this token's number of one row of [rows, N]; returns the pointer to that of the next."""
    tl.store(packed, value)
    return packed + tl.num_programs(0)


@triton.jit
def statistics_kernel(
    student,
    student_stride,
    teacher,
    teacher_stride,
    packed,
    columns,
    TEMPERATURE: tl.constexpr,
    FORWARD_CROSS: tl.constexpr,
    ENTROPIES: tl.constexpr,
    LOWEST: tl.constexpr,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """`torch_streaming.statistics` of one token."""
    token = tl.program_id(0).to(tl.int64)
    student += token * student_stride
    student_max, student_sum, student_moment = _empty(LOWEST, DTYPE)
    teacher_max, teacher_sum, teacher_moment = _empty(LOWEST, DTYPE)
    _, reverse_cross, forward_cross = _empty(LOWEST, DTYPE)
    if teacher is not None:
        teacher += token * teacher_stride
    for start in range(0, columns, TILE):
        offsets = start + tl.arange(0, TILE)
        a = _load(student, offsets, columns, TEMPERATURE, DTYPE)
        if teacher is not None:
            b = _load(teacher, offsets, columns, TEMPERATURE, DTYPE)
            teacher_max, teacher_shift, teacher_scale, b, teacher_exp = _advance(teacher_max, b)
        student_max, student_shift, student_scale, a, student_exp = _advance(student_max, a)
        if teacher is not None:
            shift = student_shift - teacher_shift
            reverse_cross = _move(reverse_cross, student_sum, student_scale, shift)
            reverse_cross += _expectation(student_exp, a - b)
            if FORWARD_CROSS:
                forward_cross = _move(forward_cross, teacher_sum, teacher_scale, -shift)
                forward_cross += _expectation(teacher_exp, b - a)
            if ENTROPIES:
                teacher_moment = _move(teacher_moment, teacher_sum, teacher_scale, teacher_shift)
                teacher_moment += _expectation(teacher_exp, b)
            teacher_sum = teacher_sum * teacher_scale + tl.sum(teacher_exp, 0)
        if ENTROPIES:
            student_moment = _move(student_moment, student_sum, student_scale, student_shift)
            student_moment += _expectation(student_exp, a)
        student_sum = student_sum * student_scale + tl.sum(student_exp, 0)
    packed = _store_row(packed + token, student_max)  # and so on, in the order of `statistic_names`
    packed = _store_row(packed, student_sum)
    if teacher is not None:
        packed = _store_row(packed, teacher_max)
        packed = _store_row(packed, teacher_sum)
        packed = _store_row(packed, reverse_cross)
    if FORWARD_CROSS:
        packed = _store_row(packed, forward_cross)
    if ENTROPIES:
        packed = _store_row(packed, student_moment)
        if teacher is not None:
            packed = _store_row(packed, teacher_moment)


@triton.jit
def jsd_statistics_kernel(
    student,
    student_stride,
    teacher,
    teacher_stride,
    student_max_N,
    teacher_max_N,
    log_sum_ratio_N,
    packed,
    columns,
    TEMPERATURE: tl.constexpr,
    BETA: tl.constexpr,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """`torch_streaming.jsd_statistics` of one token."""
    token = tl.program_id(0).to(tl.int64)
    student += token * student_stride
    teacher += token * teacher_stride
    student_max = tl.load(student_max_N + token)
    teacher_max = tl.load(teacher_max_N + token)
    log_sum_ratio = tl.load(log_sum_ratio_N + token)
    _, student_total, teacher_total = _empty(0.0, DTYPE)
    for start in range(0, columns, TILE):
        offsets = start + tl.arange(0, TILE)
        a = _load(student, offsets, columns, TEMPERATURE, DTYPE) - student_max
        b = _load(teacher, offsets, columns, TEMPERATURE, DTYPE) - teacher_max
        student_log, teacher_log = _log_to_mixture(b - a + log_sum_ratio, BETA)
        student_total += _expectation(_exp(a), student_log)
        teacher_total += _expectation(_exp(b), teacher_log)
    _store_row(_store_row(packed + token, student_total), teacher_total)


@triton.jit
def gradient_kernel(
    student,
    student_stride,
    teacher,
    teacher_stride,
    out,
    out_stride,
    student_max_N,
    divergence_scale_N,
    logprob_scale_N,
    teacher_max_N,
    center_N,
    teacher_scale_N,
    log_sum_ratio_N,
    columns,
    KIND: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BETA: tl.constexpr,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """`torch_streaming.gradient` of one token."""
    token = tl.program_id(0).to(tl.int64)
    student += token * student_stride
    out += token * out_stride
    student_max = tl.load(student_max_N + token)
    divergence_scale = tl.full((), 0.0, DTYPE)
    if divergence_scale_N is not None:
        divergence_scale = tl.load(divergence_scale_N + token)
    logprob_scale = tl.full((), 0.0, DTYPE)
    if logprob_scale_N is not None:
        logprob_scale = tl.load(logprob_scale_N + token)
    if KIND != "logprob":
        teacher += token * teacher_stride
        teacher_max = tl.load(teacher_max_N + token)
    if KIND == "forward_kl":
        teacher_scale = tl.load(teacher_scale_N + token)
    elif KIND != "logprob":
        center = tl.load(center_N + token)
    if KIND == "jsd":
        log_sum_ratio = tl.load(log_sum_ratio_N + token)
    for start in range(0, columns, TILE):
        offsets = start + tl.arange(0, TILE)
        a = _load(student, offsets, columns, TEMPERATURE, DTYPE) - student_max
        weight = _exp(a)
        if KIND == "logprob":
            gradient = weight * (divergence_scale - logprob_scale)
        else:
            b = _load(teacher, offsets, columns, TEMPERATURE, DTYPE) - teacher_max
            if KIND == "forward_kl":
                gradient = weight * (divergence_scale - logprob_scale) - _exp(b) * teacher_scale
            else:
                if KIND == "jsd":
                    term, _ = _log_to_mixture(b - a + log_sum_ratio, BETA)
                else:
                    term = a - b
                term = tl.where(weight > 0, term - center, 0.0)
                gradient = weight * (divergence_scale * term - logprob_scale)
        tl.store(out + offsets, gradient.to(out.dtype.element_ty), mask=offsets < columns)
