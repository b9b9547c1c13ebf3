"""Token weights: the published numbers, numbers by hand, and the loops of the reference."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from megatron_opd.objectives import reference, token_weights
from megatron_opd.objectives.token_weights import TOKEN_WEIGHT_FIELDS, TOKEN_WEIGHT_KINDS, TokenWeight
from tests.objectives.packs import READS_GAPS, SETTINGS, Packed, exact_gaps, packed, scenes, setting_name


@pytest.mark.parametrize("setting", SETTINGS, ids=setting_name)
@pytest.mark.parametrize("scene", scenes().values(), ids=scenes().keys())
def test_equals_reference_in_every_scene(scene: Packed, setting: dict[str, Any]) -> None:
    for scale in ({}, {"gamma": 2.0, "floor": 0.0}, {"gamma": 0.0}):
        for unit_mean in (False, True):
            known = setting | scale | {"unit_mean": unit_mean}
            weights, truth = token_weights(*scene, **known), reference.token_weights(*scene, **known)
            torch.testing.assert_close(weights, truth, rtol=1e-12, atol=1e-12)
            assert (weights[~scene[1]] == 0.0).all()


@settings(max_examples=200, deadline=None)
@given(
    packed(),
    st.sampled_from(SETTINGS),
    st.sampled_from([0.0, 0.5, 3.0]),
    st.sampled_from([0.0, 1.0, 0.3]),
    st.booleans(),
)
def test_equals_reference(
    batch: Packed, setting: dict[str, Any], gamma: float, floor: float, unit_mean: bool
) -> None:
    known = setting | {"gamma": gamma, "floor": floor, "unit_mean": unit_mean}
    truth = reference.token_weights(*batch, **known)
    torch.testing.assert_close(token_weights(*batch, **known), truth, rtol=1e-12, atol=1e-12)
    single = token_weights(batch[0].float(), *batch[1:], **known)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), truth, rtol=1e-6, atol=1e-6)


ONE = torch.tensor([0, 3])
ALL = torch.ones(3, dtype=torch.bool)


def test_published_formula() -> None:
    gaps = torch.tensor([1.0, -2.0, 1.0])
    weights = token_weights(gaps, ALL, ONE)
    assert weights.tolist() == [1.5, 1.375, 1.125] and weights.dtype == torch.float32
    assert token_weights(gaps, ALL, ONE, gamma=0.0).tolist() == [1.0, 1.0, 1.0]
    assert token_weights(gaps, ALL, ONE, floor=0.0, gamma=1.0).tolist() == [1.0, 0.75, 0.25]
    assert token_weights(gaps, ALL, torch.tensor([0, 1, 3])).tolist() == [1.5, 1.5, pytest.approx(1 + 1 / 6)]


def test_the_total_counts_the_last_token_as_the_authors_code_does() -> None:
    # Over the first two gaps only, as Eq. 17 is written, the last token would have exactly 1.
    assert token_weights(torch.tensor([1.0, 1.0, 2.0]), ALL, ONE).tolist() == [1.5, 1.375, 1.25]


def test_signed_form_rebounds_and_is_clamped() -> None:
    cu_seqlens, mask = torch.tensor([0, 4]), torch.ones(4, dtype=torch.bool)

    def signed(*gaps: float) -> list[float]:
        return token_weights(torch.tensor(gaps), mask, cu_seqlens, signed=True).tolist()

    assert signed(2.0, -1.0, 1.0, 2.0) == [1.5, 1.25, 1.375, 1.25]  # shares 0, 1/2, 1/4, 1/2
    assert signed(-2.0, -1.0, 1.0, -2.0) == [1.5, 1.25, 1.125, 1.25]  # a total below 0 as well
    assert signed(3.0, -4.0, 1.0, 2.0) == [1.5, 1.0, 1.5, 1.5]  # shares 0, 3/2, -1/2, 0
    assert signed(1.0, -2.0, 1.0, 0.0) == [1.5, 1.0, 1.5, 1.5]  # the total is 0


def test_prefix_ratio_by_hand() -> None:
    gaps = torch.tensor([math.log(4.0), -math.log(16.0), 1.0], dtype=torch.float64)
    weights = token_weights(gaps, ALL, ONE, kind="prefix_ratio", gamma=2.0, floor=0.5, alpha=0.5)
    assert weights.tolist() == pytest.approx([2.5, 4.5, 1.5], rel=1e-14)
    clipped = token_weights(gaps, ALL, ONE, kind="prefix_ratio", gamma=2.0, floor=0.5, alpha=0.5, clip=1.25)
    assert clipped.tolist() == pytest.approx([2.5, 3.0, 1.5], rel=1e-14)
    far = torch.tensor([2000.0, -9000.0, 0.0])  # exp would overflow, then underflow
    assert token_weights(far, ALL, ONE, kind="prefix_ratio", alpha=1.0, clip=4.0).tolist() == [1.5, 3.0, 1.0]


def test_kinds_by_place_by_hand() -> None:
    """Ten unmasked tokens behind a masked one."""
    mask = torch.tensor([False] + [True] * 10)

    def weigh(kind: str, **options: Any) -> list[float]:
        weights = token_weights(torch.zeros(11).double(), mask, torch.tensor([0, 11]), kind=kind, **options)
        assert weights[0] == 0.0
        return weights[1:].tolist()

    assert weigh("prefix_window") == [1.5] * 3 + [1.0] * 7
    assert weigh("prefix_window", fraction=0.31) == [1.5] * 4 + [1.0] * 6
    assert weigh("prefix_window", floor=0.0, gamma=1.0) == [1.0] * 3 + [0.0] * 7
    assert weigh("suffix_window", fraction=0.25) == [1.0] * 7 + [1.5] * 3
    assert weigh("prefix_window", fraction=0.0) == weigh("suffix_window", fraction=0.0) == [1.0] * 10
    assert weigh("curriculum", progress=0.0) == weigh("prefix_window")
    assert weigh("curriculum", progress=0.5) == [1.5] * 7 + [1.0] * 3  # 0.3 + 0.7 / 2 = 0.65
    assert weigh("curriculum", progress=1.0) == [1.5] * 10
    assert weigh("linear_decay", gamma=1.0) == pytest.approx([2.0 - 0.1 * i for i in range(10)], rel=1e-15)
    assert weigh("increasing", gamma=1.0) == pytest.approx([1.1 + 0.1 * i for i in range(10)], rel=1e-15)


def test_a_fraction_that_rounding_lifts_over_an_integer() -> None:
    mask = torch.ones(100, dtype=torch.bool)
    assert 0.07 * 100 > 7
    weights = token_weights(
        torch.zeros(100), mask, torch.tensor([0, 100]), kind="prefix_window", fraction=0.07
    )
    assert int((weights > 1.0).sum()) == 7


def test_masked_tokens_are_not_there() -> None:
    gaps = torch.tensor([9.0, 1.0, torch.nan, -2.0, 1.0, torch.inf])
    mask = torch.tensor([False, True, False, True, True, False])
    assert token_weights(gaps, mask, torch.tensor([0, 6])).tolist() == [0.0, 1.5, 0.0, 1.375, 1.125, 0.0]


def test_degenerate_responses() -> None:
    """No gaps, one token, all masked: what the docstring says, unit_mean included."""
    gaps, mask = torch.tensor([0.0, 0.0, 7.0, 7.0]), torch.tensor([True, True, True, False])
    for kind in TOKEN_WEIGHT_KINDS:
        batch = (gaps, mask, torch.tensor([0, 2, 3, 4]))
        plain = token_weights(*batch, kind=kind, gamma=2.0).tolist()
        assert plain[2:] == [1.0 if kind == "uniform" else 3.0, 0.0]
        if kind in READS_GAPS:
            assert plain[:2] == [3.0, 3.0]
        unit = token_weights(*batch, kind=kind, gamma=2.0, unit_mean=True)
        assert unit[2:].tolist() == [1.0, 0.0] and unit[:2].sum().item() == pytest.approx(2.0)
        nothing = token_weights(*batch, kind=kind, gamma=0.0, floor=0.0, unit_mean=True)
        assert nothing.tolist() == ([1.0, 1.0, 1.0, 0.0] if kind == "uniform" else [0.0] * 4)
        for offsets in ([0], [0, 0]):
            empty = (torch.zeros(0), torch.zeros(0, dtype=torch.bool), torch.tensor(offsets))
            assert token_weights(*empty, kind=kind, unit_mean=True).shape == (0,)


def test_the_table_names_the_settings_that_each_kind_reads() -> None:
    gaps, mask, cu_seqlens = exact_gaps(20, seed=3), torch.ones(20, dtype=torch.bool), torch.tensor([0, 20])
    changes = {
        "gamma": 0.7, "floor": 0.4, "signed": True, "alpha": 0.9, "clip": 0.5, "fraction": 0.8, "unit_mean": True,
    }  # fmt: skip
    for kind, fields in TOKEN_WEIGHT_FIELDS.items():
        usual = token_weights(gaps, mask, cu_seqlens, kind=kind)
        changed = {
            field
            for field, value in changes.items()
            if not torch.equal(token_weights(gaps, mask, cu_seqlens, kind=kind, **{field: value}), usual)  # type: ignore[arg-type]
        }
        assert changed == set(fields), kind
    assert set(changes) | {"kind"} == set(vars(TokenWeight()))


def test_detached() -> None:
    gaps = torch.randn(3, requires_grad=True)
    for setting in SETTINGS:
        assert not token_weights(gaps, ALL, ONE, **setting).requires_grad


def test_long_packed_buffer_in_float32() -> None:
    torch.manual_seed(0)
    gaps = torch.cat([torch.full((60_000,), 20.0), 1e-3 * torch.randn(64)])
    mask, cu_seqlens = torch.ones(len(gaps), dtype=torch.bool), torch.tensor([0, 60_000, 60_064])
    weights = token_weights(gaps, mask, cu_seqlens)
    alone = reference.token_weights(gaps[60_000:], mask[60_000:], torch.tensor([0, 64]))
    torch.testing.assert_close(weights[60_000:].double(), alone, rtol=2e-7, atol=0)
    line = 1.5 - 0.5 * torch.arange(60_000).double() / 60_000
    torch.testing.assert_close(weights[:60_000].double(), line, rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kind": "late"},
            "unknown token weight kind 'late'; supported: uniform, cumulative_share, prefix_ratio",
        ),
        ({"gamma": -0.1}, "gamma must not be negative"),
        ({"floor": math.nan}, "floor must not be negative and must be finite"),
        ({"alpha": math.inf}, "alpha must not be negative and must be finite"),
        ({"clip": 0.0}, "clip must be finite and positive"),
        ({"fraction": 1.01}, r"fraction must lie in \[0, 1\]"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenWeight(**change)
    with pytest.raises(ValueError, match=message):
        token_weights(torch.ones(3), ALL, ONE, **change)


@pytest.mark.parametrize(
    ("gaps", "mask", "cu_seqlens", "options", "message"),
    [
        (torch.ones(3), torch.ones(4), ONE, {}, r"shape \[N\], not \(3,\) and \(4,\)"),
        (torch.ones(1, 3), torch.ones(1, 3), ONE, {}, r"shape \[N\], not \(1, 3\) and \(1, 3\)"),
        (torch.ones(3), ALL, torch.tensor([0, 2]), {}, "cu_seqlens must run from 0"),
        (torch.ones(3), ALL, ONE, {"progress": 1.5}, r"progress must lie in \[0, 1\]"),
    ],
)
def test_bad_arguments(
    gaps: Tensor, mask: Tensor, cu_seqlens: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        token_weights(gaps, mask, cu_seqlens, **options)
