"""Token weights: what holds for every kind, or for the published one, whatever the responses are."""

from __future__ import annotations

import itertools
import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from megatron_opd.objectives import reference, token_weights
from tests.objectives.packs import READS_GAPS, SETTINGS, Packed, exact_gaps, packed, setting_name


def responses(weights: Tensor, batch: Packed) -> list[Tensor]:
    """The unmasked weights of each response that has some."""
    lengths = batch[2].diff().tolist()
    parts = zip(weights.split(lengths), batch[1].split(lengths), strict=True) if lengths else []
    return [part[real] for part, real in parts if real.any()]


@settings(max_examples=100, deadline=None)
@given(packed(), st.floats(0.0, 4.0), st.floats(0.0, 2.0), st.booleans())
def test_cumulative_share_is_bounded_starts_at_the_top_and_falls(
    batch: Packed, gamma: float, floor: float, signed: bool
) -> None:
    weights = token_weights(*batch, gamma=gamma, floor=floor, signed=signed)
    assert (weights[~batch[1]] == 0.0).all()
    for response in responses(weights, batch):
        assert response[0] == floor + gamma
        assert ((response >= floor) & (response <= floor + gamma)).all()
        assert signed or (response.diff() <= 0.0).all()


@settings(max_examples=50, deadline=None)
@given(packed(), st.sampled_from([2.0**-30, 1e-3, 3.0, 1e5]), st.booleans())
def test_cumulative_share_does_not_depend_on_the_scale_of_the_gaps(
    batch: Packed, scale: float, unit_mean: bool
) -> None:
    gaps, mask, cu_seqlens = batch
    weights, scaled = (token_weights(g, mask, cu_seqlens, unit_mean=unit_mean) for g in (gaps, scale * gaps))
    torch.testing.assert_close(scaled, weights, rtol=1e-12, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(packed(), st.sampled_from(SETTINGS), st.sampled_from([0.0, 1.0]))
def test_unit_mean_keeps_the_shape(batch: Packed, setting: dict[str, Any], floor: float) -> None:
    known = setting | {"floor": floor}
    plain, scaled = (token_weights(*batch, **known, unit_mean=unit_mean) for unit_mean in (False, True))
    for before, after in zip(responses(plain, batch), responses(scaled, batch), strict=True):
        if before.any():
            assert after.mean().item() == pytest.approx(1.0, abs=1e-12)
        torch.testing.assert_close(after * before.sum(), before * len(before), rtol=1e-12, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(packed(), st.sampled_from(SETTINGS), st.booleans(), st.sampled_from([0.0, 1e9, math.nan, -math.inf]))
def test_responses_and_masked_positions_do_not_matter_to_others(
    batch: Packed, setting: dict[str, Any], unit_mean: bool, other: float
) -> None:
    gaps, mask, cu_seqlens = batch
    known = setting | {"unit_mean": unit_mean}
    together = token_weights(gaps.where(mask, other), mask, cu_seqlens, **known)
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        part = slice(start, stop)
        alone = token_weights(gaps[part], mask[part], torch.tensor([0, stop - start]), **known)
        assert torch.equal(together[part], alone)


@pytest.mark.parametrize("setting", SETTINGS, ids=setting_name)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("unit_mean", [False, True])
def test_a_gap_that_is_not_finite_spoils_its_response_only(
    setting: dict[str, Any], bad: float, unit_mean: bool
) -> None:
    known = setting | {"unit_mean": unit_mean}
    for position in (3, 5):  # in the middle and last
        gaps, mask = exact_gaps(9, seed=1), torch.tensor([True, True] + [False] + [True] * 6)
        cu_seqlens = torch.tensor([0, 2, 6, 9])
        clean = token_weights(gaps, mask, cu_seqlens, **known)
        gaps[position] = bad
        weights = token_weights(gaps, mask, cu_seqlens, **known)
        expected = clean.clone()
        if setting["kind"] in READS_GAPS:
            expected[3:6] = math.nan
        torch.testing.assert_close(weights, expected, rtol=0, atol=0, equal_nan=True)
        truth = reference.token_weights(gaps, mask, cu_seqlens, **known)
        torch.testing.assert_close(weights, truth, rtol=1e-12, atol=1e-12, equal_nan=True)
