"""topk_divergence against the float64 reference, what it equals when K = V, and what the sampled tail expects."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings

from megatron_opd.objectives import reference, topk_divergence, vocab_parallel_divergence
from megatron_opd.objectives.topk import REMAINDERS, SUPPORTS, TOPK_KINDS
from tests.gloo_pool import GlooPools
from tests.objectives.cases import (
    MASSES,
    assert_matches,
    assert_stats,
    detached,
    random_case,
    run_shard,
)
from tests.objectives.covering import covering
from tests.objectives.topk_cases import SOURCES, allowed, topk_case

WORLDS = [1, 2, 4]


@pytest.mark.parametrize(
    "setting",
    covering(
        source=SOURCES,
        remainder=REMAINDERS,
        kind=TOPK_KINDS,
        world_size=WORLDS,
        vocabulary=[
            (96, 1.0, 96),
            (83, 0.7, 96),
            (60, 1.3, 96),
            (83, 1.0, 84),
        ],  # size, temperature, teacher's width
        k=[1, 7, 40],  # 40 is more than a shard of 4 ranks has
        allowed=lambda s: allowed(s) and (s["world_size"] == 1 or s["vocabulary"][2] == 96),
    ),
)
def test_float64_exact(gloo: GlooPools, setting: dict[str, Any]) -> None:
    vocab_size, temperature, teacher_width = setting["vocabulary"]
    case = topk_case(
        setting["source"],
        setting["k"],
        vocab_size=vocab_size,
        temperature=temperature,
        kind=setting["kind"],
        remainder=setting["remainder"],
    )
    case.student[:, vocab_size:] = 1e3
    case.teacher[:, vocab_size:] = torch.nan
    case.teacher = case.teacher[:, :teacher_width]
    assert_matches(case, gloo(setting["world_size"], run_shard, case), 1e-10)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(0, 6),
    st.integers(2, 9),
    st.sampled_from(WORLDS),
    st.floats(0, 1),
    st.sampled_from(SOURCES),
    st.sampled_from(REMAINDERS),
    st.sampled_from(TOPK_KINDS),
    st.integers(1, 12),
)
def test_float64_exact_whatever_the_shapes(
    gloo: GlooPools,
    seed: int,
    count: int,
    shard: int,
    world_size: int,
    real: float,
    source: str,
    remainder: str,
    kind: str,
    k: int,
) -> None:
    assume(allowed({"remainder": remainder, "kind": kind, "source": source}))
    vocab_size = max(1, round(real * shard * world_size))
    # A rest that is rounding noise is judged in test_degenerate, with K = V.
    assume(remainder != "bucket" or vocab_size > k + 1)
    options = {"vocab_size": vocab_size, "remainder": remainder, "kind": kind}
    case = topk_case(source, k, seed, count, shard * world_size, **options)
    assert_matches(case, gloo(world_size, run_shard, case), 1e-10)


@pytest.mark.parametrize(
    "setting",
    covering(
        source=["teacher_topk", "student_topk", "student_topk_sampled", "server"],
        remainder=REMAINDERS,
        kind=TOPK_KINDS,
        world_size=WORLDS,
        k=[83, 96, 1000],
        allowed=allowed,
    ),
)
def test_all_ids_are_the_whole_divergence(gloo: GlooPools, setting: dict[str, Any]) -> None:
    options = {"vocab_size": 83, "temperature": 0.7, "kind": setting["kind"]}
    case = topk_case(setting["source"], setting["k"], remainder=setting["remainder"], **options)
    if case.served is not None:
        case.served = torch.arange(83).expand(13, -1)
    outcomes = gloo(setting["world_size"], run_shard, case)
    case.options, case.served = options, None
    stats, gradient = case.truth()
    # A bucket's rest is rounding noise here, at most some 1e-15 times its logarithm.
    for outcome in outcomes:
        ours = {"divergence": outcome.stats["divergence"]}
        assert_stats(ours, stats, 1e-10)
        for name in MASSES:
            torch.testing.assert_close(outcome.stats[name], torch.ones(13, dtype=torch.float64))
    shards = torch.cat([outcome.gradient for outcome in outcomes], dim=1)
    torch.testing.assert_close(shards, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("k", [1, 5, 12])
@pytest.mark.parametrize("off_policy", [False, True])
def test_sampled_tail_expects_the_full_reverse_kl(k: int, off_policy: bool) -> None:
    """Summed over all tokens that may be drawn, with their probabilities: value and gradient, exactly."""
    count, width = 4, 12
    case = random_case(count, width, largest_scale=3.0)
    student = case.student.clone().requires_grad_()
    drawn_from = case.student + off_policy * torch.linspace(-1, 1, width, dtype=torch.float64)
    rollout = drawn_from.log_softmax(1)
    divergence, gradient = torch.zeros(count).double(), torch.zeros(count, width).double()
    for token in range(width):
        stats = topk_divergence(
            student,
            case.teacher,
            k=k,
            support="student_topk",
            remainder="sampled_tail",
            targets=torch.full((count,), token),
            rollout_logprob=rollout[:, token],
        )
        probability = rollout[:, token].exp()
        (each,) = torch.autograd.grad((probability * stats.divergence).sum(), student)
        divergence += probability * stats.divergence.detach()
        gradient += each
    truth = vocab_parallel_divergence(student, case.teacher).divergence
    torch.testing.assert_close(divergence, truth.detach(), rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad(truth.sum(), student)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("remainder", ["bucket", "mass_correction", "renormalize"])
@pytest.mark.parametrize("kind", TOPK_KINDS)
@pytest.mark.parametrize("source", SUPPORTS)
def test_divergences_are_never_negative(kind: str, source: str, remainder: str) -> None:
    case = topk_case(source, 7, count=50, kind=kind, remainder=remainder)
    divergence = case.run(case.student, case.teacher).divergence
    assert (divergence >= -1e-15).all() and divergence.max() > 0.1


def test_known_value() -> None:
    student = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([[0.25, 0.5, 0.125, 0.125]], dtype=torch.float64).log()
    log2 = 0.6931471805599453
    expected = {
        ("reverse_kl", "renormalize"): (2 / 3 - 1 / 3) * log2,
        ("reverse_kl", "bucket"): (0.5 - 0.25) * log2,
        ("reverse_kl", "none"): (0.5 - 0.25) * log2,
        ("reverse_kl", "mass_correction"): (0.5 - 0.25) * log2,
    }
    for (kind, remainder), value in expected.items():
        stats = topk_divergence(student, teacher, k=2, kind=kind, remainder=remainder)
        assert stats.divergence.item() == pytest.approx(value, abs=1e-15)
        assert stats.student_mass is not None and stats.student_mass.item() == pytest.approx(0.75, abs=1e-15)


def test_support_of_each_source() -> None:
    """The masses tell which ids were taken."""
    student = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    teacher = torch.tensor([[0.05, 0.15, 0.35, 0.45]], dtype=torch.float64)
    for support, target, ids in (
        ("teacher_topk", 0, [2, 3]),
        ("student_topk", 3, [0, 1]),
        ("teacher_topk_sampled", 0, [0, 2, 3]),
        ("teacher_topk_sampled", 3, [2, 3]),
        ("student_topk_sampled", 3, [0, 1, 3]),
        ("student_topk_sampled", 1, [0, 1]),
    ):
        stats = topk_divergence(
            student.log(), teacher.log(), k=2, support=support, targets=torch.tensor([target])
        )
        assert stats.student_mass is not None and stats.teacher_mass is not None
        torch.testing.assert_close(stats.student_mass, student[:, ids].sum(1))
        torch.testing.assert_close(stats.teacher_mass, teacher[:, ids].sum(1))


def test_gradient_reaches_the_student_only_and_not_through_the_choice() -> None:
    case = topk_case("student_topk", 5)
    teacher = case.teacher.clone().requires_grad_()
    stats = case.run(case.student.clone().requires_grad_(), teacher)
    stats.divergence.sum().backward()
    assert teacher.grad is None
    logprobs = case.teacher.log_softmax(1).requires_grad_()
    ids = case.teacher.topk(5).indices
    served = topk_divergence(
        case.student.clone().requires_grad_(), (ids, logprobs.gather(1, ids)), remainder="none"
    )
    served.divergence.sum().backward()
    assert logprobs.grad is None


def test_what_a_server_cannot_tell_is_none() -> None:
    case = topk_case("server", 5)
    stats = case.run(case.student, case.teacher, entropies=True)
    assert stats.reverse_kl is None and stats.teacher_entropy is None and stats.student_entropy is not None
    truth = reference.vocab_parallel_divergence(case.student, case.teacher, targets=case.targets)
    assert_stats({"student_entropy": stats.student_entropy}, truth, 1e-12)
    assert detached(stats)["teacher_logprob"] is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": None}, "k must be at least 1, not None"),
        ({"k": 0}, "k must be at least 1, not 0"),
        ({"kind": "jsd"}, "unknown divergence kind 'jsd'; supported: reverse_kl, forward_kl"),
        ({"support": "full"}, "unknown support 'full'; supported: teacher_topk"),
        ({"remainder": "tail"}, "unknown remainder 'tail'; supported: renormalize"),
        ({"support": "student_topk_sampled"}, "support student_topk_sampled needs targets"),
        ({"remainder": "sampled_tail"}, "remainder sampled_tail needs targets"),
        ({"remainder": "sampled_tail", "kind": "forward_kl"}, "sampled_tail needs reverse_kl"),
        ({"remainder": "sampled_tail", "support": "teacher_topk_sampled"}, "sampled_tail needs reverse_kl"),
        ({"teacher_logits": "served"}, "ids from a server are the whole support; do not give k"),
        (
            {"teacher_logits": "served", "k": None, "support": "teacher_topk_sampled", "targets": 13},
            "teacher_logprob",
        ),
        ({"targets": 12}, r"targets must have shape \(13,\)"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    case = random_case()
    if change.get("teacher_logits") == "served":
        change = change | {"teacher_logits": (torch.zeros(13, 4, dtype=torch.int64), torch.zeros(13, 4))}
    if "targets" in change:
        change = change | {"targets": torch.zeros(change["targets"], dtype=torch.int64)}
    arguments: dict[str, Any] = {
        "student_logits": case.student,
        "teacher_logits": case.teacher,
        "k": 4,
    } | change
    with pytest.raises(ValueError, match=message):
        topk_divergence(**arguments)
