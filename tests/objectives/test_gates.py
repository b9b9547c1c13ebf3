"""Which tokens the gates open for, at and around their bounds."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from megatron_opd.objectives.gates import Gate, aopd_gate, teacher_entropy_gate
from megatron_opd.objectives.reference.policy_gradient import aopd_gate as looped_aopd_gate
from megatron_opd.objectives.reference.policy_gradient import teacher_entropy_gate as looped_entropy_gate

LOGPROBS = st.floats(-20.0, 0.0) | st.sampled_from([0.0, float("-inf")])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(LOGPROBS, LOGPROBS), max_size=8),
    st.floats(-1.0, 1.0) | st.sampled_from([-1.0, -0.2, 0.0, 1.0]),
)
def test_aopd_equals_reference(rows: list[tuple[float, float]], tau: float) -> None:
    teacher, old = torch.tensor(rows, dtype=torch.float64).reshape(-1, 2).unbind(1)
    ours, truth = aopd_gate(teacher, old, tau), looped_aopd_gate(teacher, old, tau)
    # The two exponentials may differ in the last digit.
    clear = ((teacher.exp() - old.exp()) - tau).abs() > 1e-15
    assert ours.dtype == torch.bool and torch.equal(
        ours[clear | (abs(tau) == 1.0)], truth[clear | (abs(tau) == 1.0)]
    )


def test_aopd_by_hand() -> None:
    teacher = torch.tensor([0.5, 0.5, 0.5, 0.0, 1.0]).log()
    old = torch.tensor([0.5, 0.625, 0.25, 1.0, 0.0]).log()
    for tau, expected in {
        0.0: [True, True, False, True, False],  # equal probabilities are gated: <= in Eq. 9
        -0.125: [False, True, False, True, False],
        0.25: [True, True, True, True, False],
        1.0: [True] * 5,
        -1.0: [False] * 5,  # even p_s = 1 with p_t = 0
    }.items():
        assert aopd_gate(teacher, old, tau).tolist() == expected


def test_aopd_everywhere_whatever_rounding_does() -> None:
    above = torch.tensor([1e-6])  # exp is more than 1
    never = torch.tensor([-torch.inf])
    assert aopd_gate(above, never, 1.0).all() and not aopd_gate(never, above, -1.0).any()
    assert not aopd_gate(torch.tensor([torch.nan]), never, 0.5).any()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.0, 3.0) | st.just(0.8), max_size=8), st.sampled_from([0.0, 0.8]))
def test_teacher_entropy_equals_reference(entropies: list[float], threshold: float) -> None:
    entropy = torch.tensor(entropies, dtype=torch.float64)
    gate = teacher_entropy_gate(entropy, threshold)
    assert gate.dtype == torch.bool and torch.equal(gate, looped_entropy_gate(entropy, threshold))


def test_teacher_entropy_is_strict() -> None:
    assert teacher_entropy_gate(torch.tensor([0.25, 0.5, 0.75]), 0.5).tolist() == [False, False, True]


def test_detached() -> None:
    leaf = torch.zeros(2, requires_grad=True)
    for tau in (-1.0, 0.0, 1.0):
        assert not aopd_gate(leaf, leaf, tau).requires_grad
    assert not teacher_entropy_gate(leaf, 0.0).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "entropy"}, "unknown gate kind 'entropy'; supported: none, aopd, teacher_entropy"),
        ({"tau": 1.5}, r"tau must lie in \[-1, 1\], not 1.5"),
        ({"threshold": -0.1}, "threshold must be finite and not negative"),
        ({"coefficient": float("nan")}, "coefficient must be finite and not negative"),
        ({"divergence": "jsd"}, "unknown gate divergence 'jsd'; supported: forward_kl, reverse_kl"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gate(**change)
