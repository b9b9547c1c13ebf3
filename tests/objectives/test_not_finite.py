"""NaN and infinity in the logits: never hidden in value or gradient, and named by check=True on every rank alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gloo_pool import GlooPools
from tests.objectives.cases import KINDS, Case, random_case, run_shard
from tests.objectives.linear_cases import LinearCase, random_linear_case, run_linear_shard
from tests.objectives.topk_cases import topk_case

BAD = [torch.nan, torch.inf]
CHOICES = [
    (source, kind, remainder, k)
    for source in ("teacher_topk", "student_topk", "teacher_topk_sampled", "server")
    for kind in ("reverse_kl", "forward_kl")
    for remainder in ("renormalize", "bucket", "none", "mass_correction")
    for k in (1, 7)
]


def assert_only_row_is_bad(case: Case, gloo: GlooPools, row: int) -> None:
    others = [other for other in range(13) if other != row]
    for outcome in gloo(4, run_shard, case):
        divergence = outcome.stats["divergence"]
        assert divergence is not None and divergence.isnan().nonzero().tolist() == [[row]]
        assert outcome.gradient[row].isnan().all()
        assert outcome.gradient[others].isfinite().all()


@pytest.mark.parametrize("tensor", ["student", "teacher"])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_not_hidden(gloo: GlooPools, divergence: dict[str, Any], tensor: str, value: float) -> None:
    case = random_case(**divergence)
    case.logprob_grad.zero_()
    getattr(case, tensor)[6, 50] = value
    assert_only_row_is_bad(case, gloo, 6)


@pytest.mark.parametrize(("source", "kind", "remainder", "k"), CHOICES)
@pytest.mark.parametrize("tensor", ["student", "teacher"])
def test_not_hidden_by_a_support(
    gloo: GlooPools, source: str, kind: str, remainder: str, k: int, tensor: str
) -> None:
    if source == "server" and tensor == "teacher":
        return  # its logits are not here
    case = topk_case(source, k, kind=kind, remainder=remainder)
    case.logprob_grad.zero_()
    getattr(case, tensor)[6, 50] = torch.nan
    assert_only_row_is_bad(case, gloo, 6)


@pytest.mark.parametrize("remainder", ["renormalize", "none"])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_not_hidden_in_what_a_server_says(kind: str, remainder: str) -> None:
    case = topk_case("server", 5, kind=kind, remainder=remainder)
    assert case.served is not None
    student = case.student.requires_grad_()
    case.teacher[6, case.served[6].max()] = torch.nan
    stats = case.run(student, case.teacher)
    assert stats.divergence.isnan().nonzero().tolist() == [[6]]
    stats.divergence.sum().backward()
    assert student.grad is not None and student.grad.isnan().any(1).nonzero().tolist() == [[6]]


def checked(case: Case | LinearCase) -> str:
    try:
        if isinstance(case, Case):
            run_shard(case)
        else:
            run_linear_shard(case)
    except FloatingPointError as error:
        return str(error)
    return "passed"


@pytest.mark.parametrize("tensor", ["student", "teacher"])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("source", ["full", "teacher_topk", "student_topk"])
def test_check_names_the_tensor_on_every_rank(
    gloo: GlooPools, source: str, tensor: str, value: float
) -> None:
    case = random_case(check=True) if source == "full" else topk_case(source, 5, check=True)
    assert gloo(4, checked, case) == ["passed"] * 4
    getattr(case, tensor)[6, 50] = value
    where = "on tensor-parallel ranks [2], at 1 of 13 tokens, first at token 6"
    assert gloo(4, checked, case) == [f"{tensor} logits hold NaN or inf {where}"] * 4


def test_check_of_a_student_beside_a_server(gloo: GlooPools) -> None:
    case = topk_case("server", 5, check=True)
    assert gloo(2, checked, case) == ["passed"] * 2
    case.student[0, 3] = torch.nan
    message = (
        "student logits hold NaN or inf on tensor-parallel ranks [0], at 1 of 13 tokens, first at token 0"
    )
    assert gloo(2, checked, case) == [message] * 2


@pytest.mark.parametrize("name", ["student", "teacher"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_check_of_computed_logits(gloo: GlooPools, sequence_parallel: bool, name: str) -> None:
    options: dict[str, Any] = {
        "check": True,
        "chunk_size": 5,
        "sequence_parallel": sequence_parallel,
        "vocab_size": 41,
    }
    case = random_linear_case(**options)
    assert gloo(4, checked, case) == ["passed"] * 4
    getattr(case, f"{name}_weight")[13] = torch.nan  # of 12 rows a rank
    message = (
        f"{name} logits hold NaN or inf on tensor-parallel ranks [1], at 12 of 12 tokens, first at token 0"
    )
    assert gloo(4, checked, case) == [message] * 4
    case = random_linear_case(**options)
    getattr(case, f"{name}_hidden")[7] = torch.inf
    where = "on tensor-parallel ranks [0, 1, 2, 3], at 1 of 12 tokens, first at token 7"
    message = f"{name} logits hold NaN or inf {where}"
    assert gloo(4, checked, case) == [message] * 4


def test_check_finds_empty_rows_and_excluded_ids(gloo: GlooPools) -> None:
    case = random_case(check=True)
    case.student[3] = -torch.inf
    message = "student logits have no finite value, at 1 of 13 tokens, first at token 3"
    assert gloo(2, checked, case) == [message] * 2
    for kind, excluder, other in (("reverse_kl", "teacher", "student"), ("forward_kl", "student", "teacher")):
        case = random_case(check=True, kind=kind)
        case.targets.zero_()
        getattr(case, excluder)[4, 95] = -torch.inf
        message = (
            f"{excluder} logits are -inf where the {other} may draw, at 1 of 13 tokens, first at token 4"
        )
        assert gloo(2, checked, case) == [message] * 2


def test_padding_is_not_judged(gloo: GlooPools) -> None:
    case = random_case(check=True, vocab_size=60)
    case.student[:, 60:] = torch.nan
    case.teacher[:, 60:] = torch.inf
    assert gloo(4, checked, case) == ["passed"] * 4
