"""Prefix sums within the segments of a packed buffer, as one vectorised pass.

Shape suffixes: N positions of the buffer, S segments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SegmentScan(NamedTuple):
    """Prefix sums and totals of every segment, float64."""

    exclusive_N: Tensor  # sum of the values before this position in its segment
    total_N: Tensor  # sum over the whole segment, at each of its positions


def segmented_prefix_sums(values_N: Tensor, cu_seqlens: Tensor) -> SegmentScan:
    """Exclusive prefix sums and totals of values_N [N] within each segment cu_seqlens[s] : cu_seqlens[s + 1].

    cu_seqlens is [S + 1], integer, starts at 0, does not decrease and ends at N; empty segments are allowed.
    The sum runs over the whole buffer and the offset of each segment is taken off, in float64: in float32 the
    offsets would cost the digits that short segments need. A value that is not finite therefore spoils the
    segments behind it too. ValueError if cu_seqlens does not run from 0 to N.
    """
    count = values_N.shape[0]
    offsets = cu_seqlens.to(device=values_N.device, dtype=torch.int64)
    if offsets.numel() == 0 or offsets[[0, -1]].tolist() != [0, count]:
        raise ValueError(
            f"cu_seqlens must run from 0 to the number of positions, {count}, not {offsets.tolist()}"
        )
    # before[i] is the sum of all values in front of position i, whatever their segment.
    before = torch.zeros(count + 1, dtype=torch.float64, device=values_N.device)
    torch.cumsum(values_N, 0, dtype=torch.float64, out=before[1:])
    at_start_S, at_end_S = before[offsets[:-1]], before[offsets[1:]]
    lengths_S = offsets.diff()
    start_N = at_start_S.repeat_interleave(lengths_S, output_size=count)
    total_N = (at_end_S - at_start_S).repeat_interleave(lengths_S, output_size=count)
    return SegmentScan(before[:-1] - start_N, total_N)
