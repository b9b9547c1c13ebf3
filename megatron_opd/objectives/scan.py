"""Prefix sums and discounted suffix sums within the segments of a packed buffer, vectorised.

Both double the reach of every sum log2(longest segment) times. Unlike a cumulative sum over the whole buffer,
from which each segment's offset is taken off, this keeps segments apart to the last bit: no digits are lost
to a large neighbour, and a value that is not finite reaches the sums that contain it and no others.

Shape suffixes: T positions of the packed buffer, S segments.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor


class SegmentScan(NamedTuple):
    """Prefix sums and totals of every segment, float64."""

    exclusive_T: Tensor  # sum of the values before this position in its segment
    total_T: Tensor  # sum over the whole segment, at each of its positions


def segmented_prefix_sums(values_T: Tensor, cu_seqlens: Tensor) -> SegmentScan:
    """Exclusive prefix sums and totals of values_T [T] within each segment cu_seqlens[s] : cu_seqlens[s + 1].

    cu_seqlens is [S + 1], integer, starts at 0, does not decrease and ends at T; empty segments are allowed,
    and so are a buffer without positions and cu_seqlens [0]. Float64 and detached, whatever values_T is. The
    order of summation depends on the place within the segment only. ValueError if cu_seqlens does not run
    from 0 to T without decreasing.
    """
    segments = _Segments.of(cu_seqlens, values_T)
    inclusive_T = _discounted_sums(values_T, segments.index_T, segments.longest, 1.0)
    exclusive_T = inclusive_T.roll(1).masked_fill(segments.index_T == 0, 0.0)
    return SegmentScan(exclusive_T, inclusive_T[segments.last_T])


def discounted_suffix_sums(values_T: Tensor, cu_seqlens: Tensor, discount: float) -> Tensor:
    """y_t = sum_{t' >= t} discount^(t' - t) * values_t' over the segment of t: [T], float64, detached.

    cu_seqlens as in `segmented_prefix_sums`. discount 0 returns the values, discount 1 their plain suffix
    sums. ValueError for a discount outside [0, 1] and for cu_seqlens that do not fit.
    """
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"discount must lie in [0, 1], not {discount}")
    segments = _Segments.of(cu_seqlens, values_T)
    if discount == 0.0:
        return values_T.detach().to(torch.float64, copy=True)
    behind_T = segments.last_T - torch.arange(len(values_T), device=values_T.device)
    return _discounted_sums(values_T.flip(0), behind_T.flip(0), segments.longest, discount).flip(0)


class _Segments(NamedTuple):
    """Where the positions of a packed buffer lie, int64."""

    index_T: Tensor  # place within the segment, from 0
    last_T: Tensor  # position of the segment's last element
    longest: int

    @classmethod
    def of(cls, cu_seqlens: Tensor, values_T: Tensor) -> _Segments:
        """Of the buffer that values_T fills, on its device, after one look at cu_seqlens from the host."""
        count, offsets = len(values_T), cu_seqlens.tolist()
        lengths = [stop - start for start, stop in itertools.pairwise(offsets)]
        if not offsets or offsets[0] != 0 or offsets[-1] != count or any(length < 0 for length in lengths):
            raise ValueError(
                f"cu_seqlens must run from 0 to the number of positions, {count}, without decreasing, "
                f"not {offsets}"
            )
        offsets_S1 = torch.tensor(offsets, dtype=torch.int64, device=values_T.device)
        lengths_S = offsets_S1.diff()
        start_T, stop_T = (
            edge_S.repeat_interleave(lengths_S, output_size=count)
            for edge_S in (offsets_S1[:-1], offsets_S1[1:])
        )
        index_T = torch.arange(count, device=values_T.device) - start_T
        return cls(index_T, stop_T - 1, max(lengths, default=0))


def _discounted_sums(values_T: Tensor, index_T: Tensor, longest: int, discount: float) -> Tensor:
    """Inclusive sums y_t = v_t + discount * y_{t-1} within segments, where index_T counts from 0 in each."""
    sums_T = values_T.detach().to(torch.float64, copy=True)
    reach = 1
    while reach < longest:
        before_T = sums_T[:-reach].where(index_T[reach:] >= reach, 0.0)
        sums_T[reach:] += discount**reach * before_T
        reach *= 2
    return sums_T
