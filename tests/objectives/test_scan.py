"""Segmented prefix sums against plain loops."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from megatron_opd.objectives import segmented_prefix_sums

lengths = st.lists(st.integers(0, 7), max_size=8)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(0, 2**31))
def test_equals_loops(lengths: list[int], seed: int) -> None:
    values = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cu_seqlens = torch.tensor(
        [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32
    )
    scan = segmented_prefix_sums(values, cu_seqlens)
    parts = values.split(lengths) if lengths else ()
    exclusive = [float(part[:i].sum()) for part in parts for i in range(len(part))]
    totals = [float(part.sum()) for part in parts for _ in part]
    torch.testing.assert_close(
        scan.exclusive_N, torch.tensor(exclusive, dtype=torch.float64), rtol=0, atol=1e-13
    )
    torch.testing.assert_close(scan.total_N, torch.tensor(totals, dtype=torch.float64), rtol=0, atol=1e-13)


def test_small_segment_behind_a_large_one_keeps_its_digits() -> None:
    values = torch.cat([torch.full((50_000,), 12.3), torch.tensor([1e-3, 2e-3, 3e-3])])
    scan = segmented_prefix_sums(values, torch.tensor([0, 50_000, 50_003]))
    assert scan.exclusive_N[-3:].tolist() == pytest.approx([0.0, 1e-3, 3e-3], rel=1e-6)
    assert scan.total_N[-1].item() == pytest.approx(6e-3, rel=1e-6)


@pytest.mark.parametrize("cu_seqlens", [[], [0], [0, 4], [1, 5], [0, 6]])
def test_offsets_that_do_not_fit(cu_seqlens: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens must run from 0 to the number of positions, 5"):
        segmented_prefix_sums(torch.ones(5), torch.tensor(cu_seqlens, dtype=torch.int32))
