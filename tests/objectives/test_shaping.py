"""Shaped rewards against the papers' formulas, and what PowerOPD promises about its own."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from megatron_opd.objectives.reference.policy_gradient import shaped_reward as looped_reward
from megatron_opd.objectives.shaping import Shaping, shaped_reward

LOGPROBS = st.lists(st.tuples(*[st.floats(-30.0, 0.0)] * 3), max_size=8)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"reference_weight": 1.25},
    {"reference_weight": 0.0},
    {"clip": 5.0},
    {"reference_weight": 2.0, "clip": 0.5},
    {"power": 5.0},
    {"power": 0.3, "clip": 0.1},
]


def columns(rows: list[tuple[float, ...]]) -> list[Tensor]:
    return list(torch.tensor(rows, dtype=torch.float64).reshape(-1, 3).unbind(1))


@settings(max_examples=200, deadline=None)
@given(LOGPROBS, st.sampled_from(OPTIONS))
def test_equals_reference(rows: list[tuple[float, ...]], options: dict[str, Any]) -> None:
    teacher, old, reference = columns(rows)
    reward = shaped_reward(teacher, old, reference_logprob_N=reference, **options)
    truth = looped_reward(teacher, old, reference_logprob_N=reference, **options)
    torch.testing.assert_close(reward, truth, rtol=1e-10, atol=1e-10)


def test_by_hand() -> None:
    teacher, old, reference = torch.tensor([[0.5], [0.25], [0.125]]).log().unbind()
    assert shaped_reward(teacher, old).item() == pytest.approx(math.log(2))
    exopd = shaped_reward(teacher, old, reference_logprob_N=reference, reference_weight=1.25)
    assert exopd.item() == pytest.approx(1.5 * math.log(2))  # -(1 - 1.25 * 2) bits
    assert shaped_reward(teacher, old, power=2.0).item() == pytest.approx(0.25 - 0.0625)
    assert shaped_reward(old, teacher, clip=0.5).item() == -0.5


@settings(max_examples=100, deadline=None)
@given(LOGPROBS)
def test_weight_one_needs_no_reference(rows: list[tuple[float, ...]]) -> None:
    teacher, old, reference = columns(rows)
    plain = shaped_reward(teacher, old)
    assert torch.equal(plain, shaped_reward(teacher, old, reference_logprob_N=reference))
    torch.testing.assert_close(plain, looped_reward(teacher, old, reference_logprob_N=reference))


@settings(max_examples=200, deadline=None)
@given(LOGPROBS, st.floats(1e-3, 10.0), st.sampled_from([torch.float32, torch.float64]))
def test_power_is_bounded_with_the_sign_of_the_gap(
    rows: list[tuple[float, ...]], power: float, dtype: torch.dtype
) -> None:
    teacher, old, _ = (column.to(dtype) for column in columns(rows))
    reward, gap = shaped_reward(teacher, old, power=power), teacher - old
    assert reward.dtype == dtype and (reward.abs() <= 1.0).all()
    assert (reward * gap.sign() >= 0.0).all()
    # p^power itself may be too small a number, and so may be the gap times power.
    visible = (power * torch.maximum(teacher, old) > -80.0) & (gap.abs() > 1e-6)
    assert torch.equal(reward.sign()[visible], gap.sign()[visible])


def test_power_tends_to_the_gap() -> None:
    teacher = torch.tensor([-0.1, -3.0, -9.0, -0.5], dtype=torch.float64)
    old = torch.tensor([-4.0, -0.2, -9.5, -0.5], dtype=torch.float64)
    errors = [(shaped_reward(teacher, old, power=a) / a - (teacher - old)).abs() for a in (1e-2, 1e-4, 1e-9)]
    assert (errors[1][:3] < 0.02 * errors[0][:3]).all()  # of first order in the power
    assert (errors[2] < 1e-6).all() and errors[0][3] == 0.0


def test_power_at_the_ends() -> None:
    never, rare, sure, above = -torch.inf, -2000.0, 0.0, 1e-6
    teacher = torch.tensor([never, sure, rare, sure, above, rare])
    old = torch.tensor([sure, never, sure, rare, rare, rare])
    assert shaped_reward(teacher, old, power=5.0).tolist() == [-1.0, 1.0, -1.0, 1.0, 1.0, 0.0]


def test_detached_and_empty() -> None:
    leaves = torch.randn(3, 4).requires_grad_()
    for options in OPTIONS:
        reward = shaped_reward(leaves[0], leaves[1], reference_logprob_N=leaves[2], **options)
        assert not reward.requires_grad
        nothing = torch.zeros(0)
        assert shaped_reward(nothing, nothing, reference_logprob_N=nothing, **options).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference_weight": -1.0}, "reference_weight must be finite and not negative, not -1.0"),
        ({"reference_weight": float("nan")}, "reference_weight must be finite"),
        ({"clip": 0.0}, "clip must be finite and positive"),
        ({"power": 0.0}, "power must be finite and positive"),
        ({"power": float("inf")}, "power must be finite and positive"),
        ({"power": 5.0, "reference_weight": 1.25}, "power does not combine with a reference_weight other"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shaping(**change)
    with pytest.raises(ValueError, match=message):
        shaped_reward(torch.zeros(1), torch.zeros(1), **change)


def test_weight_without_reference() -> None:
    with pytest.raises(ValueError, match=r"reference_weight 1\.25 needs the reference policy"):
        shaped_reward(torch.zeros(1), torch.zeros(1), reference_weight=1.25)
