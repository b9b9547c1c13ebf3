"""What the divergences make of equal models, tiny and empty supports, ties, excluded ids and NaN: each defined.

Ordinary inputs at every sharding are the business of the test file of each function.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opd.objectives import TokenStats, reference, topk_divergence, vocab_parallel_divergence
from megatron_opd.objectives.topk import REMAINDERS, SUPPORTS, TOPK_KINDS
from tests.gloo_pool import GlooPools
from tests.objectives.cases import KINDS, Case, assert_matches, assert_stats, detached, random_case, run_shard
from tests.objectives.linear_cases import random_linear_case
from tests.objectives.topk_cases import SOURCES, allowed, topk_case

CHOICES = [
    (source, kind, remainder)
    for source, kind, remainder in itertools.product(SOURCES, TOPK_KINDS, REMAINDERS)
    if allowed({"source": source, "kind": kind, "remainder": remainder})
]
ZERO = 1e-14  # rounding of a sum of float64 probabilities


def graded(stats: TokenStats, student: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(stats.divergence.sum(), student)
    return gradient


@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_equal_models_have_nothing_to_learn(divergence: dict[str, Any]) -> None:
    case = random_case(vocab_size=83, temperature=0.7, **divergence)
    student = case.student.requires_grad_()
    stats = case.run(student, case.student.detach().clone())
    assert (stats.divergence.abs() <= ZERO).all() and (graded(stats, student).abs() <= ZERO).all()
    linear = random_linear_case(vocab_size=41, chunk_size=5, **divergence)
    hidden, weight = linear.student_hidden.requires_grad_(), linear.student_weight.requires_grad_()
    linear.teacher_hidden = linear.student_hidden.detach().clone()
    stats = linear.run(hidden, weight, linear.student_weight.detach().clone())
    assert (stats.divergence.abs() <= ZERO).all()
    for gradient in torch.autograd.grad(stats.divergence.sum(), (hidden, weight)):
        assert (gradient.abs() <= ZERO).all()


@pytest.mark.parametrize(("source", "kind", "remainder"), [c for c in CHOICES if c[2] != "none"])
def test_equal_models_have_nothing_to_learn_on_a_support(source: str, kind: str, remainder: str) -> None:
    case = topk_case(source, 7, vocab_size=83, temperature=0.7, remainder=remainder, kind=kind)
    case.teacher = case.student.clone()
    student = case.student.requires_grad_()
    stats = case.run(student, case.teacher)
    assert (stats.divergence.abs() <= ZERO).all() and (graded(stats, student).abs() <= ZERO).all()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", TOPK_KINDS)
def test_equal_models_without_a_remainder_move_by_the_mass(source: str, kind: str) -> None:
    """forward: (sum_S p) p_v - p_v 1[v in S], which takes mass to S; reverse: the same with the other sign.

    The sum of p log(p / q) has the derivative p_v for log p_v where p = q, the sum of q log(q / p) has -q_v.
    """
    case = topk_case(source, 7, remainder="none", kind=kind)
    case.teacher = case.student.clone()
    student = case.student.requires_grad_()
    stats = case.run(student, case.teacher)
    p_NV = case.student.detach().softmax(1)
    best = p_NV.topk(7).indices if case.served is None else case.served.clamp(min=0)
    present = torch.ones_like(best, dtype=p_NV.dtype) if case.served is None else (case.served >= 0).double()
    inside_NV = torch.zeros_like(p_NV).scatter_add(1, best, present)
    if source.endswith("_sampled"):
        inside_NV = inside_NV.scatter(1, case.targets[:, None], 1.0)
    mass_N1 = (p_NV * inside_NV).sum(1, keepdim=True)
    expected = mass_N1 * p_NV - p_NV * inside_NV
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(stats.divergence, torch.zeros(13).double(), rtol=0, atol=ZERO)
    torch.testing.assert_close(
        graded(stats, student), expected if kind == "forward_kl" else -expected, rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("kind", TOPK_KINDS)
@pytest.mark.parametrize("source", ["teacher_topk", "student_topk", "server"])
def test_one_id_renormalized_is_certain(source: str, kind: str) -> None:
    case = topk_case(source, 1, kind=kind)
    student = case.student.requires_grad_()
    stats = case.run(student, case.teacher)
    assert (stats.divergence == 0).all() and (graded(stats, student) == 0).all()


@pytest.mark.parametrize(("source", "kind", "remainder"), [c for c in CHOICES if c[0] == "server"])
def test_rows_in_which_a_server_names_nothing(
    gloo: GlooPools, source: str, kind: str, remainder: str
) -> None:
    """Their divergence, masses and gradient are 0, and those of the other rows are untouched by them."""
    case = topk_case(source, 5, kind=kind, remainder=remainder)
    case.logprob_grad.zero_()
    if (
        remainder == "sampled_tail"
    ):  # there the sampled token stands for the whole vocabulary, and still counts
        case.targets = case.teacher.argmax(1)
    whole = gloo(1, run_shard, case)[0]
    assert case.served is not None
    case.served[3:5] = -1
    others = [row for row in range(13) if row not in (3, 4)]
    outcomes = gloo(2, run_shard, case)
    gradient = torch.cat([outcome.gradient for outcome in outcomes], dim=1)
    for outcome in outcomes:
        for name in ("divergence", "student_mass", "teacher_mass"):
            ours, theirs = outcome.stats[name], whole.stats[name]
            assert ours is not None and theirs is not None
            torch.testing.assert_close(ours[others], theirs[others], rtol=1e-12, atol=1e-12)
            sampled = name == "divergence" and remainder == "sampled_tail"
            assert sampled or (ours[3:5] == 0).all()
    torch.testing.assert_close(gradient[others], whole.gradient[others], rtol=1e-12, atol=1e-12)
    assert remainder == "sampled_tail" or (gradient[3:5] == 0).all()


def test_a_server_that_names_nothing_leaves_the_sampled_token() -> None:
    case = topk_case("server_sampled", 5, remainder="none")
    case.served = torch.full((13, 0), -1)
    stats = case.run(case.student, case.teacher)
    assert stats.student_logprob is not None and stats.teacher_logprob is not None
    probability = stats.student_logprob.exp()
    torch.testing.assert_close(stats.divergence, -probability * stats.log_gap)
    torch.testing.assert_close(stats.student_mass, probability)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("remainder", ["renormalize", "bucket"])
def test_no_token_and_one_token(gloo: GlooPools, source: str, remainder: str, count: int) -> None:
    case = topk_case(source, 5, count=count, vocab_size=60, remainder=remainder)
    assert_matches(case, gloo(4, run_shard, case), 1e-10)


@pytest.mark.parametrize("source", SUPPORTS)
@pytest.mark.parametrize("k", [1, 7, 30, 96])
def test_ties_choose_the_same_ids_on_any_number_of_ranks(gloo: GlooPools, source: str, k: int) -> None:
    """bf16 logits of few different values; the reference, too, gives a tie to the smaller id."""
    case = topk_case(source, k, count=40)
    case.student, case.teacher = ((2 * logits).round().bfloat16() for logits in (case.student, case.teacher))
    best = (
        (case.student if source.startswith("student") else case.teacher).float().topk(min(k + 1, 96)).values
    )
    assert k == 96 or (best[:, k] == best[:, k - 1]).sum() > 20, "a case of ties at the edge of the support"
    case.divergence_grad, case.logprob_grad = case.divergence_grad / 4, case.logprob_grad / 4
    stats, gradient = case.truth()
    for world_size in (1, 2, 4):
        outcomes = gloo(world_size, run_shard, case)
        assert_stats(outcomes[0].stats, stats, 2e-5)
        ours = torch.cat([outcome.gradient for outcome in outcomes], dim=1)
        torch.testing.assert_close(ours.double(), gradient, rtol=2.0**-8, atol=1e-6)


def test_all_scores_equal() -> None:
    zeros, ramp = torch.zeros(1, 8).double(), torch.arange(8.0).double()[None]
    for support, student, teacher in (("teacher_topk", ramp, zeros), ("student_topk", zeros, ramp)):
        stats = topk_divergence(student, teacher, k=3, support=support)
        assert stats.student_mass is not None and stats.teacher_mass is not None
        torch.testing.assert_close(stats.student_mass, student.softmax(1)[:, :3].sum(1))
        torch.testing.assert_close(stats.teacher_mass, teacher.softmax(1)[:, :3].sum(1))


@pytest.mark.parametrize("remainder", ["renormalize", "none", "mass_correction"])
@pytest.mark.parametrize("kind", TOPK_KINDS)
@pytest.mark.parametrize("source", SUPPORTS)
def test_excluded_ids_on_a_support(gloo: GlooPools, source: str, kind: str, remainder: str) -> None:
    """Both models exclude ids, more than K leaves: excluded ids are never in a support of best ids."""
    case = topk_case(source, 30, kind=kind, remainder=remainder, temperature=0.7)
    case.student[:, 20:90] = -torch.inf
    case.teacher[:, 20:90] = -torch.inf
    case.targets %= 20
    stats, _ = case.truth()
    assert stats.student_mass is not None
    torch.testing.assert_close(stats.student_mass, torch.ones(13).double())
    for world_size in (1, 4):
        outcomes = gloo(world_size, run_shard, case)
        for outcome in outcomes:
            assert_stats(outcome.stats, stats, 1e-10)
        gradient = torch.cat([outcome.gradient for outcome in outcomes], dim=1)
        kept = torch.cat([torch.arange(20), torch.arange(90, 96)])
        assert (gradient[:, 20:90] == 0).all()
        small = Case(
            case.student[:, kept],
            case.teacher[:, kept],
            case.targets,
            case.divergence_grad,
            case.logprob_grad,
        )
        small.options = case.options
        torch.testing.assert_close(gradient[:, kept], small.truth()[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("kind", TOPK_KINDS)
def test_a_support_without_the_ids_that_its_model_excludes(who: str, kind: str) -> None:
    """K = 3 of a model that allows two ids: the support is those two, in value and gradient."""
    case = topk_case(f"{who}_topk", 3, kind=kind)
    chooser = case.student if who == "student" else case.teacher
    chooser[:, 2:] = -torch.inf
    stats = case.run(student := case.student.clone().requires_grad_(), case.teacher)
    two = topk_divergence(
        both := case.student.clone().requires_grad_(), case.teacher, **case.options | {"k": 2}
    )
    torch.testing.assert_close(detached(stats)["divergence"], detached(two)["divergence"])
    torch.testing.assert_close(graded(stats, student), graded(two, both))
    mass = stats.student_mass if who == "student" else stats.teacher_mass
    torch.testing.assert_close(mass, torch.ones(13).double())


@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_excluded_ids_equal_a_smaller_vocabulary(gloo: GlooPools, divergence: dict[str, Any]) -> None:
    case = random_case(**divergence, temperature=0.7)
    kept = torch.cat([torch.arange(10), torch.arange(50, 96)])
    small = Case(
        case.student[:, kept],
        case.teacher[:, kept],
        torch.zeros(13, dtype=torch.int64),
        case.divergence_grad,
        case.logprob_grad,
    )
    small.options = case.options
    case.targets = small.targets
    case.student[:, 10:50] = -torch.inf  # a whole shard of 4
    case.teacher[:, 10:50] = -torch.inf
    stats, gradient = small.truth()
    outcomes = gloo(4, run_shard, case)
    for outcome in outcomes:
        assert_stats(outcome.stats, stats, 1e-10)
    ours = torch.cat([outcome.gradient for outcome in outcomes], dim=1)
    torch.testing.assert_close(ours[:, kept], gradient, rtol=1e-10, atol=1e-10)
    assert (ours[:, 10:50] == 0).all()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_finite_whatever_either_model_excludes(gloo: GlooPools, beta: float) -> None:
    case = random_case(kind="jsd", beta=beta)
    case.targets = torch.full((13,), 30)
    case.student[:, :24] = -torch.inf  # a shard of 4
    case.teacher[:, 60:80] = -torch.inf
    outcomes = gloo(4, run_shard, case)
    for logits in (case.student, case.teacher):
        logits.masked_fill_(logits == -torch.inf, -5e3)  # probability 0 in float64, and nothing infinite
    stats, gradient = case.truth()
    for outcome in outcomes:
        assert_stats({"divergence": outcome.stats["divergence"]}, stats, 1e-10)
    ours = torch.cat([outcome.gradient for outcome in outcomes], dim=1)
    torch.testing.assert_close(ours, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_what_one_model_excludes_and_the_other_may_draw_is_infinite(kind: str) -> None:
    case = random_case(kind=kind)
    (case.teacher if kind == "reverse_kl" else case.student)[4, 95] = -torch.inf
    stats = case.run(case.student, case.teacher, check=False)
    assert stats.divergence.isinf().nonzero().tolist() == [[4]]
    with pytest.raises(FloatingPointError, match=r"logits are -inf where the .* may draw, at 1 of 13 tokens"):
        case.run(case.student, case.teacher, check=True)


def test_all_tokens_certain() -> None:
    """Probability 1 in both models: no divergence, no entropy, no gradient, nothing infinite."""
    logits = torch.full((3, 8), -torch.inf).double()
    logits[range(3), range(3)] = 5.0
    for divergence in KINDS:
        student = logits.clone().requires_grad_()
        stats = vocab_parallel_divergence(
            student, logits, targets=torch.arange(3), entropies=True, **divergence
        )
        for value in (stats.divergence, stats.log_gap, stats.student_entropy, stats.teacher_entropy):
            assert value is not None and (value.abs() <= ZERO).all()
        assert (graded(stats, student) == 0).all()
    truth = reference.vocab_parallel_divergence(logits, logits, targets=torch.arange(3))
    assert (truth.divergence == 0).all()


def test_server_ids_outside_the_vocabulary_are_absent() -> None:
    student = torch.randn(1, 8, dtype=torch.float64, requires_grad=True)
    options = {"kind": "forward_kl", "remainder": "none"}
    found, expected = (
        topk_divergence(student, (torch.tensor([ids]), torch.tensor([[-0.5, -1.5]])), **options).divergence  # type: ignore[arg-type]
        for ids in ([1, 9], [1, -1])
    )
    assert found.isfinite().all() and torch.equal(found, expected)


@pytest.mark.parametrize(("rows", "logprobs"), [(2, (2, 3)), (1, (1, 2)), (1, (3,))])
def test_server_shapes_that_do_not_agree(rows: int, logprobs: tuple[int, ...]) -> None:
    ids = torch.zeros(rows, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="shape"):
        topk_divergence(torch.randn(1, 8), (ids, torch.zeros(logprobs)))
