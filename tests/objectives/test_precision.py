"""Low-precision logits: statistics as exact as float32 allows, the gradient rounded once.

The truth is the float64 reference of the same, already rounded, inputs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opd.objectives import TokenStats, linear_divergence, reference, vocab_parallel_divergence
from tests.gloo_pool import GlooPools
from tests.objectives.cases import FIELDS, KINDS, Case, assert_stats, random_case, run_shard
from tests.objectives.linear_cases import random_linear_case
from tests.objectives.topk_cases import topk_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STATISTICS = 2e-5


def assert_rounded_once(ours: Tensor, exact: Tensor, arithmetic: float = 2e-6) -> None:
    """Each element is within half a unit in the last place of its dtype, and what float32 arithmetic costs.

    `arithmetic` is relative to the row's largest element, and to the dtype's smallest normal number.
    """
    finfo = torch.finfo(ours.dtype)
    scale = exact.abs().amax(-1, keepdim=True) + 1e-3
    allowed = finfo.eps / 2 * exact.abs() + arithmetic * scale + finfo.smallest_normal * finfo.eps
    excess = (ours.double() - exact).abs() - allowed
    assert (excess <= 0).all(), f"{excess.max():.1e} more than one rounding"


def assert_precise(case: Case, gloo: GlooPools, dtype: torch.dtype) -> None:
    stats, gradient = case.truth()
    outcomes = gloo(2, run_shard, case)
    for outcome in outcomes:
        assert all(value is None or value.dtype == torch.float32 for value in outcome.stats.values())
        assert_stats(outcome.stats, stats, STATISTICS)
    ours = torch.cat([outcome.gradient for outcome in outcomes], dim=1)
    assert ours.dtype == dtype
    # Log-probabilities that are hundreds apart leave hundreds of times float32's last bit.
    gap = (stats.divergence.abs().amax() + 1).item()
    assert_rounded_once(ours, gradient, 2e-6 * gap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_logits(gloo: GlooPools, divergence: dict[str, Any], dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"vocab_size": 4001, "temperature": 0.7, **divergence}
    assert_precise(random_case(count=9, width=4096, dtype=dtype, **options), gloo, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("remainder", ["renormalize", "none", "mass_correction"])
@pytest.mark.parametrize("source", ["teacher_topk", "student_topk_sampled"])
def test_support(gloo: GlooPools, source: str, remainder: str, kind: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"vocab_size": 1001, "kind": kind, "remainder": remainder}
    assert_precise(topk_case(source, 30, count=9, width=1024, dtype=dtype, **options), gloo, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_bucket_resolves_the_rest_as_well_as_the_sum_of_the_support(kind: str, dtype: torch.dtype) -> None:
    case = topk_case("teacher_topk", 30, count=9, width=1024, dtype=dtype, kind=kind, remainder="bucket")
    truth, _ = case.truth()
    assert truth.student_mass is not None and truth.teacher_mass is not None
    rest = torch.minimum(1 - truth.student_mass, 1 - truth.teacher_mass)
    divergence = case.run(case.student, case.teacher).divergence.double()
    assert ((divergence - truth.divergence).abs() <= 2e-5 + 1e-6 / rest).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("probability", [0.9, 0.999, 0.9999])
def test_confident_token(dtype: torch.dtype, probability: float) -> None:
    """1 - p at the target: p rounded to bf16 is 1, and then nothing would be left of it."""
    student = torch.zeros(1, 64).double()
    student[0, 5] = torch.tensor(probability / (1 - probability) * 63).double().log()
    student = student.to(dtype)
    exact_student = student.double().requires_grad_()
    exact = reference.vocab_parallel_divergence(exact_student, student, targets=torch.tensor([5]))
    assert exact.student_logprob is not None
    (gradient,) = torch.autograd.grad(exact.student_logprob.sum(), exact_student)
    assert 0 < gradient[0, 5] < 1.1 * (1 - probability)
    shared = student.clone().requires_grad_()
    stats = vocab_parallel_divergence(shared, student, targets=torch.tensor([5]))
    assert stats.student_logprob is not None
    (ours,) = torch.autograd.grad(stats.student_logprob.sum(), shared)
    eps, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    # A few last bits of float32 at p are 4e-3 of what is left of 1 at 0.9999.
    rounding = eps / 2 + 4e-7 / (1 - probability)
    torch.testing.assert_close(ours.double(), gradient, rtol=rounding, atol=smallest * eps / 2)


@pytest.mark.parametrize("remainder", ["none", "mass_correction", "renormalize"])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_confident_token_of_a_support(kind: str, remainder: str) -> None:
    case = topk_case("teacher_topk_sampled", 3, count=4, kind=kind, remainder=remainder)
    case.targets = case.teacher.argmax(1)
    for logits in (case.student, case.teacher):
        logits.scatter_(1, case.targets[:, None], logits.logsumexp(1, keepdim=True) + 6.9)  # p near 1 - 1e-3
    case.student, case.teacher = case.student.bfloat16(), case.teacher.bfloat16()
    student = case.student.clone().requires_grad_()
    stats = case.run(student, case.teacher)
    assert stats.student_logprob is not None
    assert (stats.student_logprob.exp() > 0.99).all()
    total = (stats.divergence * case.divergence_grad + stats.student_logprob * case.logprob_grad).sum()
    (ours,) = torch.autograd.grad(total, student)
    assert_rounded_once(ours, case.truth()[1], 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_hidden_states(divergence: dict[str, Any], dtype: torch.dtype) -> None:
    """Chunks and their products are in the head's dtype: as exact as the same logits held whole."""
    case = random_linear_case(24, 96, 16, 8, dtype=dtype, chunk_size=7, vocab_size=83, **divergence)
    case.divergence_grad, case.logprob_grad = case.divergence_grad / 4, case.logprob_grad / 4
    hidden = case.student_hidden.clone().requires_grad_()
    weight = case.student_weight.clone().requires_grad_()
    buffer = torch.zeros(weight.shape)
    stats = case.run(hidden, weight, case.teacher_weight, weight_grad=buffer, entropies=True)
    student = case.student_hidden @ case.student_weight.T
    teacher = case.teacher_hidden @ case.teacher_weight.T
    whole = Case(student, teacher, case.targets, case.divergence_grad, case.logprob_grad, case.options)
    truth, logits_grad = whole.truth()
    assert_stats({name: getattr(stats, name) for name in FIELDS}, truth, STATISTICS)
    case.loss(stats).backward()
    assert hidden.grad is not None and hidden.grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    # Two halves of eps: the logits' gradient is rounded and so is the product, relative to all that is added up.
    for ours, exact, added in (
        (hidden.grad, logits_grad @ weight.double(), logits_grad.abs() @ weight.double().abs()),
        (buffer, logits_grad.T @ hidden.double(), logits_grad.abs().T @ hidden.double().abs()),
    ):
        assert ((ours.double() - exact).abs() <= eps * added + 1e-4).all()


def test_float32_students_of_float64_teachers_are_compared_in_float64() -> None:
    case = random_case(dtype=torch.float32)
    stats: TokenStats = vocab_parallel_divergence(case.student, case.teacher.double(), targets=case.targets)
    assert stats.divergence.dtype == torch.float64
    truth = reference.vocab_parallel_divergence(case.student, case.teacher, targets=case.targets)
    assert_stats({"divergence": stats.divergence}, truth, 1e-12)
    linear = random_linear_case(dtype=torch.bfloat16)
    mixed = linear_divergence(
        linear.student_hidden,
        linear.student_weight,
        linear.teacher_hidden.float(),
        linear.teacher_weight.float(),
    )
    assert mixed.divergence.dtype == torch.float32
