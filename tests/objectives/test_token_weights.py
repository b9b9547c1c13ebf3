"""Token weights: the published numbers, the loops of the reference, and the properties the paper names."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from megatron_opd.objectives import reference, token_weights


@st.composite
def packed(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Gaps, mask and cu_seqlens of up to 6 responses, some empty, some fully masked, some without a gap."""
    lengths = draw(st.lists(st.integers(0, 9), max_size=6))
    count = sum(lengths)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    gaps = torch.randn(count, generator=generator, dtype=torch.float64) * draw(
        st.sampled_from([1e-6, 1.0, 50.0])
    )
    gaps *= torch.rand(count, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    mask = torch.rand(count, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    gaps[~mask] = torch.nan
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return gaps, mask, torch.tensor(offsets, dtype=torch.int32)


def test_published_formula() -> None:
    gaps, mask = torch.tensor([1.0, -2.0, 1.0]), torch.ones(3, dtype=torch.bool)
    weights = token_weights(gaps, mask, torch.tensor([0, 3]))
    assert weights.tolist() == [1.5, 1.375, 1.125] and weights.dtype == torch.float32
    assert token_weights(gaps, mask, torch.tensor([0, 3]), gamma=0.0).tolist() == [1.0, 1.0, 1.0]
    assert token_weights(gaps, mask, torch.tensor([0, 1, 3])).tolist() == [1.5, 1.5, pytest.approx(1 + 1 / 6)]


def test_masked_tokens_are_not_there() -> None:
    gaps = torch.tensor([9.0, 1.0, torch.nan, -2.0, 1.0, torch.inf])
    mask = torch.tensor([False, True, False, True, True, False])
    assert token_weights(gaps, mask, torch.tensor([0, 6])).tolist() == [0.0, 1.5, 0.0, 1.375, 1.125, 0.0]


def test_no_gap_and_one_token() -> None:
    mask = torch.ones(4, dtype=torch.bool)
    weights = token_weights(torch.tensor([0.0, 0.0, 0.0, 7.0]), mask, torch.tensor([0, 3, 4]), gamma=2.0)
    assert weights.tolist() == [3.0] * 4


@settings(max_examples=150, deadline=None)
@given(
    packed(),
    st.sampled_from(["uniform", "cumulative_share"]),
    st.sampled_from([0.0, 0.5, 3.0]),
    st.booleans(),
)
def test_equals_reference(
    batch: tuple[Tensor, Tensor, Tensor], kind: str, gamma: float, unit_mean: bool
) -> None:
    weights = token_weights(*batch, kind=kind, gamma=gamma, unit_mean=unit_mean)
    truth = reference.token_weights(*batch, kind=kind, gamma=gamma, unit_mean=unit_mean)
    torch.testing.assert_close(weights, truth, rtol=1e-12, atol=1e-12)
    single = token_weights(batch[0].float(), *batch[1:], kind=kind, gamma=gamma, unit_mean=unit_mean)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), truth, rtol=1e-6, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(packed(), st.floats(0.0, 4.0))
def test_bounded_and_falling(batch: tuple[Tensor, Tensor, Tensor], gamma: float) -> None:
    gaps, mask, cu_seqlens = batch
    weights = token_weights(gaps, mask, cu_seqlens, gamma=gamma)
    assert ((weights[mask] >= 1.0) & (weights[mask] <= 1.0 + gamma)).all() and (weights[~mask] == 0.0).all()
    for part, real in zip(*(x.split(cu_seqlens.diff().tolist()) for x in (weights, mask)), strict=True):
        response = part[real]
        assert (response.diff() <= 0.0).all()
        assert len(response) == 0 or response[0] == 1.0 + gamma


@settings(max_examples=50, deadline=None)
@given(packed())
def test_unit_mean(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    plain, scaled = (token_weights(*batch, unit_mean=unit_mean) for unit_mean in (False, True))
    lengths = batch[2].diff().tolist()
    for before, after, real in zip(*(x.split(lengths) for x in (plain, scaled, batch[1])), strict=True):
        if real.any():
            assert after[real].mean().item() == pytest.approx(1.0, abs=1e-12)
            torch.testing.assert_close(after / after[real][0], before / before[real][0], rtol=1e-12, atol=0)
        assert (after[~real] == 0.0).all()


def test_detached_and_empty() -> None:
    gaps = torch.randn(3, requires_grad=True)
    assert not token_weights(gaps, torch.ones(3, dtype=torch.bool), torch.tensor([0, 3])).requires_grad
    for kind in ("uniform", "cumulative_share"):
        nothing = token_weights(
            torch.zeros(0), torch.zeros(0, dtype=torch.bool), torch.tensor([0]), kind=kind, unit_mean=True
        )
        assert nothing.shape == (0,)


def test_long_packed_buffer_in_float32() -> None:
    torch.manual_seed(0)
    gaps = torch.cat([torch.full((60_000,), 20.0), 1e-3 * torch.randn(64)])
    mask, cu_seqlens = torch.ones(len(gaps), dtype=torch.bool), torch.tensor([0, 60_000, 60_064])
    weights = token_weights(gaps, mask, cu_seqlens)[60_000:]
    alone = reference.token_weights(gaps[60_000:], mask[60_000:], torch.tensor([0, 64]))
    torch.testing.assert_close(weights.double(), alone, rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "signed"}, "unknown token weight kind 'signed'; supported: uniform, cumulative_share"),
        ({"gamma": -0.1}, "gamma must not be negative"),
        ({"mask_N": torch.ones(4, dtype=torch.bool)}, r"shape \[N\], not \(3,\) and \(4,\)"),
        ({"cu_seqlens": torch.tensor([0, 2])}, "cu_seqlens must run from 0"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    good = {
        "log_gap_N": torch.ones(3),
        "mask_N": torch.ones(3, dtype=torch.bool),
        "cu_seqlens": torch.tensor([0, 3]),
    }
    with pytest.raises(ValueError, match=message):
        token_weights(**(good | change))  # type: ignore[arg-type]
