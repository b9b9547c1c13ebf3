"""The passes of `torch_streaming` on a GPU: the same signatures, one launch of a Triton kernel each.

Bytes moved for V columns of b bytes, a token: `statistics` reads both models' logits once, 2 V b, and so does
`jsd_statistics`; `gradient` reads both once and writes once, 3 V b, tile by tile, so that it may overwrite the
student's logits. Nothing else of any size exists. Sums are float32, or float64 where an input is.

Shape suffixes: N tokens, V columns of the shard that belong to the real vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_opd.kernels.torch_streaming import GradientRows, statistic_names
from megatron_opd.kernels.triton_kernels import gradient_kernel, jsd_statistics_kernel, statistics_kernel

TILE_BYTES = 16384  # of float32 or float64 numbers per model in one tile
FEW_TOKENS = 1024  # below this, programs are wider: there are too few to keep a GPU's memory busy
DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def statistics(
    student_NV: Tensor,
    teacher_NV: Tensor | None,
    *,
    temperature: float,
    forward_cross: bool = False,
    entropies: bool = False,
) -> Tensor:
    """As `torch_streaming.statistics`; NaN logits are seen in that model's sum, not in its maximum."""
    assert teacher_NV is not None or not forward_cross
    dtype = _sum_dtype(student_NV, teacher_NV)
    names = statistic_names(teacher=teacher_NV is not None, forward_cross=forward_cross, entropies=entropies)
    packed = student_NV.new_empty(len(names), student_NV.shape[0], dtype=dtype)
    if student_NV.shape[0] > 0:
        with torch.cuda.device_of(student_NV):
            statistics_kernel[(student_NV.shape[0],)](
                *_rows(student_NV),
                *_rows(teacher_NV),
                packed,
                student_NV.shape[1],
                TEMPERATURE=temperature,
                FORWARD_CROSS=forward_cross,
                ENTROPIES=entropies,
                LOWEST=torch.finfo(dtype).min,
                **_launch_options(student_NV, dtype),
            )
    return packed


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
    """As `torch_streaming.jsd_statistics`."""
    dtype = student_max_N.dtype
    packed = student_NV.new_empty(2, student_NV.shape[0], dtype=dtype)
    if student_NV.shape[0] > 0:
        with torch.cuda.device_of(student_NV):
            jsd_statistics_kernel[(student_NV.shape[0],)](
                *_rows(student_NV),
                *_rows(teacher_NV),
                student_max_N.contiguous(),
                teacher_max_N.contiguous(),
                log_sum_ratio_N.contiguous(),
                packed,
                student_NV.shape[1],
                TEMPERATURE=temperature,
                BETA=beta,
                **_launch_options(student_NV, dtype),
            )
    return packed


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
    """As `torch_streaming.gradient`: one launch, in place where out_NV is student_NV, rounded to its dtype once."""
    assert kind in ("reverse_kl", "jsd", "forward_kl", "logprob")
    if student_NV.shape[0] > 0:
        with torch.cuda.device_of(student_NV):
            gradient_kernel[(student_NV.shape[0],)](
                *_rows(student_NV),
                *_rows(teacher_NV if kind != "logprob" else None),
                *_rows(out_NV),
                *(None if row is None else row.contiguous() for row in rows),
                student_NV.shape[1],
                KIND=kind,
                TEMPERATURE=temperature,
                BETA=beta,
                **_launch_options(student_NV, rows.student_max.dtype),
            )


def _sum_dtype(student_NV: Tensor, teacher_NV: Tensor | None) -> torch.dtype:
    widest = (
        student_NV.dtype if teacher_NV is None else torch.promote_types(student_NV.dtype, teacher_NV.dtype)
    )
    return torch.promote_types(widest, torch.float32)


def _rows(logits_NV: Tensor | None) -> tuple[Tensor | None, int]:
    """A kernel's view of logits: where they start and the distance between rows, whose columns must be adjacent."""
    if logits_NV is None:
        return None, 0
    assert logits_NV.stride(1) == 1 or logits_NV.shape[1] <= 1
    return logits_NV, logits_NV.stride(0)


def _launch_options(logits_NV: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Four warps a token hold 32 float32 numbers of each model per thread, which hides the latency of a tile.

    With few tokens a program has the warps of four.
    """
    tokens, columns = logits_NV.shape
    wider = 4 if tokens < FEW_TOKENS else 1
    tile = min(wider * TILE_BYTES // dtype.itemsize, triton.next_power_of_2(max(columns, 1)))
    return {"DTYPE": DTYPES[dtype], "TILE": tile, "num_warps": 4 * wider, "enable_fp_fusion": True}
