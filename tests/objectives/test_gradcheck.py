"""The derivatives of all three divergences against finite differences of their own values.

sampled_tail is left out: its gradient is by design not that of its value (see test_topk).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opd.objectives import TokenStats
from megatron_opd.objectives.topk import REMAINDERS, SUPPORTS, TOPK_KINDS
from tests.objectives.cases import KINDS, random_case
from tests.objectives.linear_cases import random_linear_case
from tests.objectives.topk_cases import topk_case

SMALL: dict[str, Any] = {"vocab_size": 7, "temperature": 0.7}


def holds(function: Callable[..., TokenStats], *inputs: Tensor) -> bool:
    def values(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        stats = function(*tensors)
        assert stats.student_logprob is not None
        return stats.divergence, stats.student_logprob

    return torch.autograd.gradcheck(values, tuple(tensor.clone().requires_grad_() for tensor in inputs))


@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_logits(divergence: dict[str, Any]) -> None:
    case = random_case(3, 9, largest_scale=2.0, **SMALL, **divergence)
    assert holds(lambda student: case.run(student, case.teacher), case.student)


@pytest.mark.parametrize("chunk_size", [2, 100])
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_hidden_states_and_head(divergence: dict[str, Any], chunk_size: int) -> None:
    case = random_linear_case(3, 9, 4, 2, chunk_size=chunk_size, **SMALL, **divergence)
    assert holds(
        lambda hidden, weight: case.run(hidden, weight, case.teacher_weight),
        case.student_hidden,
        case.student_weight,
    )


@pytest.mark.parametrize("source", (*SUPPORTS, "server", "server_sampled"))
@pytest.mark.parametrize("remainder", [name for name in REMAINDERS if name != "sampled_tail"])
@pytest.mark.parametrize("kind", TOPK_KINDS)
def test_support(kind: str, remainder: str, source: str) -> None:
    case = topk_case(source, 3, count=3, width=9, kind=kind, remainder=remainder, **SMALL)
    assert holds(lambda student: case.run(student, case.teacher), case.student)


def test_support_of_hidden_states_and_head() -> None:
    case = random_linear_case(3, 9, 4, 2, support="teacher_topk_sampled", k=3, chunk_size=2, **SMALL)
    assert holds(
        lambda hidden, weight: case.run(hidden, weight, case.teacher_weight),
        case.student_hidden,
        case.student_weight,
    )
