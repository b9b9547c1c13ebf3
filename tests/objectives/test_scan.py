"""Segmented prefix sums and discounted suffix sums against plain loops."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from megatron_opd.objectives.scan import discounted_suffix_sums, segmented_prefix_sums

SEGMENT_LENGTHS = st.lists(st.integers(0, 40), max_size=8)
BAD_OFFSETS = [[], [0], [0, 4], [1, 5], [0, 6], [0, 4, 3, 5]]


def draw(lengths: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Values whose scale differs from segment to segment by many orders, and their cu_seqlens."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(length, generator=generator, dtype=torch.float64) * 1000.0 ** (-i)
        for i, length in enumerate(lengths)
    ]
    offsets = [0, *itertools.accumulate(lengths)]
    return torch.cat([torch.zeros(0, dtype=torch.float64), *parts]), torch.tensor(offsets, dtype=torch.int32)


def close(result: list[float], truth: list[float], scale: float) -> bool:
    return all(
        math.isclose(x, y, rel_tol=1e-13, abs_tol=1e-14 * scale) for x, y in zip(result, truth, strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(SEGMENT_LENGTHS, st.integers(0, 2**31))
def test_prefix_sums_equal_loops(lengths: list[int], seed: int) -> None:
    values, cu_seqlens = draw(lengths, seed)
    scan = segmented_prefix_sums(values, cu_seqlens)
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        part = values[start:stop].tolist()
        scale = sum(abs(value) for value in part)
        assert close(
            scan.exclusive_T[start:stop].tolist(), [math.fsum(part[:i]) for i in range(len(part))], scale
        )
        assert close(scan.total_T[start:stop].tolist(), [math.fsum(part)] * len(part), scale)


@settings(max_examples=100, deadline=None)
@given(SEGMENT_LENGTHS, st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 0.9, 1.0]) | st.floats(0.0, 1.0))
def test_suffix_sums_equal_loops(lengths: list[int], seed: int, discount: float) -> None:
    values, cu_seqlens = draw(lengths, seed)
    result = discounted_suffix_sums(values, cu_seqlens, discount)
    assert result.dtype == torch.float64
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        part = values[start:stop].tolist()
        truth = [math.fsum(discount**k * v for k, v in enumerate(part[i:])) for i in range(len(part))]
        assert close(result[start:stop].tolist(), truth, sum(abs(value) for value in part))


def test_suffix_sums_by_hand() -> None:
    values, cu_seqlens = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([0, 3, 3, 5])
    assert discounted_suffix_sums(values, cu_seqlens, 0.0).tolist() == values.tolist()
    assert discounted_suffix_sums(values, cu_seqlens, 0.5).tolist() == [3.0, 4.0, 4.0, 16.0, 16.0]
    assert discounted_suffix_sums(values, cu_seqlens, 1.0).tolist() == [7.0, 6.0, 4.0, 24.0, 16.0]


@settings(max_examples=50, deadline=None)
@given(SEGMENT_LENGTHS, st.integers(0, 2**31), st.floats(0.0, 1.0))
def test_segments_do_not_see_each_other(lengths: list[int], seed: int, discount: float) -> None:
    values, cu_seqlens = draw(lengths, seed)
    prefix, suffix = (
        segmented_prefix_sums(values, cu_seqlens),
        discounted_suffix_sums(values, cu_seqlens, discount),
    )
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        alone, whole = values[start:stop], torch.tensor([0, stop - start])
        for together, single in zip(prefix, segmented_prefix_sums(alone, whole), strict=True):
            assert torch.equal(together[start:stop], single)
        assert torch.equal(suffix[start:stop], discounted_suffix_sums(alone, whole, discount))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_reach_only_the_sums_that_contain_them(bad: float) -> None:
    values = torch.tensor([1.0, 2.0, bad, 4.0, 1.0, 2.0, 3.0])
    scan = segmented_prefix_sums(values, torch.tensor([0, 4, 7]))
    assert scan.exclusive_T.isfinite().tolist() == [True, True, True, False, True, True, True]
    assert scan.total_T.isfinite().tolist() == [False] * 4 + [True] * 3
    suffix = discounted_suffix_sums(values, torch.tensor([0, 4, 7]), 0.9)
    assert suffix.isfinite().tolist() == [False, False, False, True, True, True, True]
    alone = discounted_suffix_sums(values, torch.tensor([0, 4, 7]), 0.0)
    assert alone.isfinite().tolist() == [True, True, False, True, True, True, True]


def test_arguments_are_left_alone_and_results_are_detached() -> None:
    values = torch.ones(3, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 3])
    results = [*segmented_prefix_sums(values, cu_seqlens)]
    results += [discounted_suffix_sums(values, cu_seqlens, discount) for discount in (0.0, 0.5, 1.0)]
    assert not any(result.requires_grad for result in results)
    for result in results:
        result.zero_()
    assert values.tolist() == [1.0, 1.0, 1.0]


def test_nothing_to_sum() -> None:
    for offsets in ([0], [0, 0], [0, 0, 0]):
        scan = segmented_prefix_sums(torch.zeros(0), torch.tensor(offsets))
        assert scan.exclusive_T.shape == scan.total_T.shape == (0,)
        assert discounted_suffix_sums(torch.zeros(0), torch.tensor(offsets), 0.5).shape == (0,)


@pytest.mark.parametrize("cu_seqlens", BAD_OFFSETS)
def test_offsets_that_do_not_fit(cu_seqlens: list[int]) -> None:
    offsets = torch.tensor(cu_seqlens, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens must run from 0 to the number of positions, 5"):
        segmented_prefix_sums(torch.ones(5), offsets)
    with pytest.raises(ValueError, match="cu_seqlens must run from 0 to the number of positions, 5"):
        discounted_suffix_sums(torch.ones(5), offsets, 0.0)


@pytest.mark.parametrize("discount", [-0.1, 1.1, math.nan])
def test_discount_outside_its_range(discount: float) -> None:
    with pytest.raises(ValueError, match=r"discount must lie in \[0, 1\]"):
        discounted_suffix_sums(torch.ones(2), torch.tensor([0, 2]), discount)
