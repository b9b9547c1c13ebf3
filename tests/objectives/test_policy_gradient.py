"""The surrogate against its formula in every corner of the clips, and the returns against a double loop.

What the estimators converge to is the business of test_policy_gradient_expectation.py.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from megatron_opd.objectives.policy_gradient import PolicyGradient, discounted_returns, policy_gradient
from megatron_opd.objectives.reference.policy_gradient import discounted_returns as looped_returns
from megatron_opd.objectives.reference.policy_gradient import policy_gradient as looped_policy_gradient

RATIOS = [0.0, 0.4, 0.79, 0.81, 1.0, 1.19, 1.21, 1.49, 1.51, 2.99, 3.01, 60.0]
ADVANTAGES = [-7.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 7.0]
BOUNDS = {
    "clip_low": [None, 0.0, 0.2, 0.6, 1.0],
    "clip_high": [None, 0.0, 0.2, 0.5],
    "dual_clip": [None, 1.2, 1.5, 3.0],
    "importance_cap": [None, 0.5, 5.0],
}


@st.composite
def surrogates(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Log-probabilities, advantages and options; where there is a mask it hides NaN."""
    count = draw(st.integers(0, 8))

    def column(values: st.SearchStrategy[float]) -> Tensor:
        return torch.tensor(draw(st.lists(values, min_size=count, max_size=count)), dtype=torch.float64)

    logprob, advantage = column(st.floats(-9.0, 0.0)), column(st.sampled_from(ADVANTAGES))
    options: dict[str, Any] = {name: draw(st.sampled_from(values)) for name, values in BOUNDS.items()}
    if draw(st.booleans()):
        ratio = column(st.sampled_from(RATIOS))
        options["old_logprob_N"] = logprob - ratio.clamp(min=1e-9).log()
    if draw(st.booleans()):
        options["rollout_logprob_N"] = logprob + column(st.floats(-3.0, 3.0))
    if draw(st.booleans()):
        options["mask_N"] = column(st.sampled_from([0.0, 1.0])).bool()
        hidden = [logprob, advantage, options.get("old_logprob_N"), options.get("rollout_logprob_N")]
        for values in [values for values in hidden if values is not None]:
            values[~options["mask_N"]] = torch.nan
    return logprob, advantage, options


@settings(max_examples=400, deadline=None)
@given(surrogates())
def test_equals_reference(case: tuple[Tensor, Tensor, dict[str, Any]]) -> None:
    logprob, advantage, options = case
    results = []
    for function in (policy_gradient, looped_policy_gradient):
        leaf = logprob.clone().requires_grad_()
        loss, clipped, importance = function(leaf, advantage, **options)
        # Clipped tokens are constants, so that alone they have no gradient function.
        (loss.sum() + 0.0 * leaf.nan_to_num().sum()).backward()
        results.append((loss.detach(), leaf.grad, clipped, importance))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.1, 2.0, -2.2, -2.2, False),
        (0.5, 2.0, -1.0, -1.0, False),  # too small already: the clip does not hinder the way back
        (1.5, 2.0, -2.4, 0.0, True),
        (0.9, -2.0, 1.8, 1.8, False),
        (0.5, -2.0, 1.6, 0.0, True),
        (2.0, -2.0, 4.0, 4.0, False),
        (3.5, -2.0, 6.0, 0.0, True),  # the dual clip
        (9.0, 0.0, 0.0, 0.0, False),
    ],
)
def test_by_hand(ratio: float, advantage: float, loss: float, gradient: float, clipped: bool) -> None:
    old = torch.tensor([-2.0], dtype=torch.float64)
    logprob = (old + torch.tensor(ratio, dtype=torch.float64).log()).requires_grad_()
    result = policy_gradient(logprob, torch.tensor([advantage]), old_logprob_N=old)
    result.loss_N.sum().backward()
    assert logprob.grad is not None
    assert result.loss_N.item() == pytest.approx(loss, abs=1e-12)
    assert logprob.grad.item() == pytest.approx(gradient, abs=1e-12)
    assert result.clipped_N.tolist() == [clipped] and result.importance_N.tolist() == [1.0]


@pytest.mark.parametrize("clip", [0.0, 0.2, None])
def test_on_policy_gradient_is_the_advantage(clip: float | None) -> None:
    torch.manual_seed(0)
    logprob, advantage = -torch.rand(50), torch.randn(50)
    rollout = logprob + torch.randn(50)
    for kwargs, weight in (
        ({}, torch.ones(50)),
        ({"rollout_logprob_N": rollout}, (logprob - rollout).exp().clamp(max=5.0)),
        ({"rollout_logprob_N": rollout, "importance_cap": None}, torch.ones(50)),
    ):
        leaf = logprob.clone().requires_grad_()
        result = policy_gradient(leaf, advantage, clip_low=clip, clip_high=clip, **kwargs)
        result.loss_N.sum().backward()
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, -weight * advantage) and torch.equal(result.loss_N, leaf.grad)
        assert torch.equal(result.importance_N, weight) and not result.clipped_N.any()


def test_gradcheck() -> None:
    ratio = torch.tensor([0.5, 0.9, 1.1, 1.5, 2.5, 4.0], dtype=torch.float64).repeat(2)
    advantage = torch.tensor([1.5, -0.7], dtype=torch.float64).repeat_interleave(6)
    old = -torch.linspace(0.5, 3.0, 12, dtype=torch.float64)
    logprob = (old + ratio.log()).requires_grad_()
    rollout = old + 0.3

    def loss(values: Tensor) -> Tensor:
        return policy_gradient(values, advantage, old_logprob_N=old, rollout_logprob_N=rollout).loss_N

    assert torch.autograd.gradcheck(loss, logprob)


def test_only_the_student_has_a_gradient() -> None:
    logprob, advantage, old, rollout = torch.randn(4, 6).unbind()
    leaves = [values.clone().requires_grad_() for values in (logprob, advantage, old, rollout)]
    result = policy_gradient(leaves[0], leaves[1], old_logprob_N=leaves[2], rollout_logprob_N=leaves[3])
    assert not result.importance_N.requires_grad and not result.clipped_N.requires_grad
    result.loss_N.sum().backward()
    assert leaves[0].grad is not None and [leaf.grad for leaf in leaves[1:]] == [None] * 3
    reward = torch.randn(6, requires_grad=True)
    mask, cu_seqlens = torch.ones(6, dtype=torch.bool), torch.tensor([0, 6])
    assert not discounted_returns(reward, mask, cu_seqlens, discount=0.5).requires_grad


def test_ratios_beyond_the_largest_number() -> None:
    """The gradient of a clipped token is 0, not 0 * inf; a NaN is not taken for a clipped token."""
    logprob = torch.tensor([-1.0, -1.0, -1.0, -2000.0], requires_grad=True)
    old = torch.tensor([-2000.0, -2000.0, torch.nan, -1.0])
    advantage = torch.tensor([1.0, -1.0, 1.0, 1.0])
    result = policy_gradient(logprob, advantage, old_logprob_N=old)
    result.loss_N.sum().backward()
    assert logprob.grad is not None
    torch.testing.assert_close(result.loss_N, torch.tensor([-1.2, 3.0, torch.nan, 0.0]), equal_nan=True)
    assert result.clipped_N.tolist() == [True, True, False, False]
    torch.testing.assert_close(logprob.grad, torch.tensor([0.0, 0.0, torch.nan, 0.0]), equal_nan=True)


def test_masked_tokens_do_not_leak() -> None:
    mask = torch.tensor([True, False, True, False])
    values = torch.tensor([[-1.0, torch.nan, -2.0, torch.inf]] * 4)
    logprob, advantage, old, rollout = values.clone().unbind()
    both: dict[str, Any] = {"old_logprob_N": old, "rollout_logprob_N": rollout}
    for optional in ({}, both):
        leaf = logprob.clone().requires_grad_()
        result = policy_gradient(leaf, advantage, mask_N=mask, **optional)
        result.loss_N.sum().backward()
        assert result.loss_N.tolist() == [1.0, 0.0, 2.0, 0.0] and not result.clipped_N.any()
        assert leaf.grad is not None and leaf.grad.tolist() == [1.0, 0.0, 2.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_and_dtypes(dtype: torch.dtype) -> None:
    empty = torch.zeros(0, dtype=dtype, requires_grad=True)
    result = policy_gradient(empty, empty, old_logprob_N=empty, rollout_logprob_N=empty)
    result.loss_N.sum().backward()
    assert result.loss_N.dtype == dtype and empty.grad is not None and empty.grad.shape == (0,)
    mixed = policy_gradient(
        torch.zeros(2, dtype=dtype),
        torch.ones(2, dtype=torch.float64),
        old_logprob_N=torch.zeros(2, dtype=torch.float32),
        rollout_logprob_N=torch.zeros(2, dtype=torch.float64),
    )
    assert mixed.loss_N.dtype == mixed.importance_N.dtype == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_low": -0.1}, r"clip_low must lie in \[0, 1\]"),
        ({"clip_low": 1.1}, "clip_low must lie"),
        ({"clip_low": float("nan")}, "clip_low must lie"),
        ({"clip_high": -0.1}, "clip_high must be finite and not negative"),
        ({"clip_high": float("inf")}, "clip_high must be finite"),
        ({"dual_clip": 1.0}, "dual_clip must be finite and greater than 1"),
        ({"importance_cap": 0.0}, "importance_cap must be finite and positive"),
        ({"discount": 1.5}, r"discount must lie in \[0, 1\], not 1.5"),
        ({"discount": -0.5}, "discount must lie"),
        ({"baseline": "value"}, "unknown baseline 'value'; supported: none, reverse_kl"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyGradient(**change)
    if not change.keys() & {"discount", "baseline"}:
        with pytest.raises(ValueError, match=message):
            policy_gradient(torch.zeros(1), torch.zeros(1), **change)


def test_settings_that_switch_things_off() -> None:
    PolicyGradient(clip_low=None, clip_high=None, dual_clip=None, importance_cap=None, discount=1.0)


def test_bad_shapes() -> None:
    good, long = torch.zeros(3), torch.zeros(4)
    with pytest.raises(ValueError, match=r"advantage has shape \(4,\) for 3 tokens"):
        policy_gradient(good, long)
    with pytest.raises(ValueError, match="rollout has shape"):
        policy_gradient(good, good, rollout_logprob_N=long)
    with pytest.raises(ValueError, match=r"one dimension, not the shape \(1, 3\)"):
        policy_gradient(good[None], good[None])
    mask, cu_seqlens = torch.ones(4, dtype=torch.bool), torch.tensor([0, 3])
    with pytest.raises(ValueError, match="mask has shape"):
        discounted_returns(good, mask, cu_seqlens, discount=1.0)
    with pytest.raises(ValueError, match="discount must lie"):
        discounted_returns(good, mask[:3], cu_seqlens, discount=1.01)


@st.composite
def packed(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, mask and cu_seqlens of up to 6 responses, some empty, some of one token, some fully masked."""
    lengths = draw(st.lists(st.integers(0, 9), max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rewards = torch.randn(sum(lengths), generator=generator, dtype=torch.float64)
    mask = torch.rand(sum(lengths), generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    rewards[~mask] = torch.nan
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return rewards, mask, torch.tensor(offsets, dtype=torch.int32)


@settings(max_examples=200, deadline=None)
@given(packed(), st.sampled_from([0.0, 0.3, 0.95, 1.0]), st.booleans(), st.booleans())
def test_returns_equal_reference(
    batch: tuple[Tensor, Tensor, Tensor], discount: float, exclude_current: bool, length_normalized: bool
) -> None:
    options: dict[str, Any] = {"exclude_current": exclude_current, "length_normalized": length_normalized}
    truth = looped_returns(*batch, discount=discount, **options)
    returns = discounted_returns(*batch, discount=discount, **options)
    torch.testing.assert_close(returns, truth, rtol=1e-10, atol=1e-10)
    single = discounted_returns(batch[0].float(), *batch[1:], discount=discount, **options)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"discount": 0.0}, [1.0, 0.0, -2.0, 4.0, 8.0]),
        ({"discount": 1.0}, [3.0, 0.0, 2.0, 4.0, 8.0]),
        ({"discount": 0.5}, [1.0 - 0.5 + 0.5, 0.0, 0.0, 4.0, 8.0]),
        ({"discount": 0.0, "exclude_current": True}, [0.0] * 5),
        ({"discount": 1.0, "exclude_current": True}, [2.0, 0.0, 4.0, 0.0, 0.0]),
        ({"discount": 0.5, "exclude_current": True}, [0.0, 0.0, 2.0, 0.0, 0.0]),
        ({"discount": 1.0, "length_normalized": True}, [1.0, 0.0, 1.0, 4.0, 8.0]),
        ({"discount": 1.0, "length_normalized": True, "exclude_current": True}, [1.0, 0.0, 4.0, 0.0, 0.0]),
    ],
)
def test_returns_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    """Two responses, the second of one token; the masked NaN of the first counts for the distance alone."""
    rewards = torch.tensor([1.0, torch.nan, -2.0, 4.0, 8.0])
    mask = torch.tensor([True, False, True, True, True])
    returns = discounted_returns(rewards, mask, torch.tensor([0, 4, 5]), **options)
    assert returns.tolist() == expected
