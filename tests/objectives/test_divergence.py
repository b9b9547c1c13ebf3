"""vocab_parallel_divergence on one rank: properties, options and the errors it raises."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from megatron_opd.objectives import TokenStats, reference, vocab_parallel_divergence
from tests.objectives.cases import FIELDS, random_case

seeds = st.integers(0, 2**31)


def draw(seed: int, count: int, width: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    return student, teacher


def test_known_value() -> None:
    student = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()
    stats = vocab_parallel_divergence(student, teacher, targets=torch.tensor([1]), entropies=True)
    kl = 0.25 * math.log(2)
    assert stats.divergence.item() == pytest.approx(kl, abs=1e-15)
    assert stats.log_gap.item() == pytest.approx(math.log(2), abs=1e-15)
    assert stats.student_entropy is not None
    assert stats.student_entropy.item() == pytest.approx(1.5 * math.log(2), abs=1e-15)
    stats.divergence.sum().backward()
    expected = [0.5 * (math.log(2) - kl), 0.25 * (-math.log(2) - kl), 0.25 * -kl]
    assert student.grad is not None
    assert student.grad[0].tolist() == pytest.approx(expected, abs=1e-15)


def test_reference_is_the_textbook_divergence() -> None:
    case = random_case(temperature=0.7)
    student, teacher = (torch.distributions.Categorical(logits=z / 0.7) for z in (case.student, case.teacher))
    stats = reference.vocab_parallel_divergence(
        case.student, case.teacher, targets=case.targets, temperature=0.7
    )
    textbook = TokenStats(
        torch.distributions.kl_divergence(student, teacher),
        student.log_prob(case.targets),
        teacher.log_prob(case.targets),
        student.entropy(),
        teacher.entropy(),
        torch.distributions.kl_divergence(student, teacher),
    )
    for name in FIELDS:
        torch.testing.assert_close(getattr(stats, name), getattr(textbook, name), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda z: reference.vocab_parallel_divergence(z, case.teacher[:3, :7]).divergence,
        case.student[:3, :7].clone().requires_grad_(),
    )


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(0, 5), st.integers(1, 40), st.floats(1e-3, 1e3), st.floats(0.1, 10))
def test_never_negative_and_equal_to_the_reference(
    seed: int, count: int, width: int, scale: float, temperature: float
) -> None:
    student, teacher = draw(seed, count, width, scale)
    ours = vocab_parallel_divergence(student, teacher, temperature=temperature).divergence
    truth = reference.vocab_parallel_divergence(student, teacher, temperature=temperature).divergence
    assert (ours >= -1e-13 * max(1.0, scale / temperature)).all()
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12 * max(1.0, scale / temperature))


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_shift_invariant(seed: int, student_shift: float, teacher_shift: float) -> None:
    student, teacher = draw(seed, 4, 19, 3.0)
    results = []
    for shifts in ((0.0, 0.0), (student_shift, teacher_shift)):
        shifted = (student + shifts[0]).requires_grad_()
        stats = vocab_parallel_divergence(shifted, teacher + shifts[1], targets=torch.tensor([0, 1, 2, 18]))
        (gradient,) = torch.autograd.grad(stats.divergence.sum(), shifted)
        results.append((stats.divergence.detach(), stats.log_gap, gradient))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_logits_give_exactly_nothing(dtype: torch.dtype) -> None:
    student = random_case(width=5000, dtype=dtype).student.requires_grad_()
    stats = vocab_parallel_divergence(student, student.detach().clone(), temperature=0.9)
    stats.divergence.sum().backward()
    assert (stats.divergence == 0).all() and student.grad is not None and (student.grad == 0).all()


def test_float32_logits_of_the_same_distribution() -> None:
    student = random_case(width=5000, dtype=torch.float32).student
    stats = vocab_parallel_divergence(student, student + 17.3)
    assert stats.divergence.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradient_in_place(dtype: torch.dtype) -> None:
    case = random_case(dtype=dtype, vocab_size=83, temperature=0.7)
    gradients = []
    for inplace in (False, True):
        leaf = case.student.clone().requires_grad_()
        logits = leaf * 1
        stats = vocab_parallel_divergence(
            logits, case.teacher, targets=case.targets, inplace_backward=inplace, **case.options
        )
        assert stats.student_logprob is not None
        (gradient,) = torch.autograd.grad((stats.divergence + stats.student_logprob).sum(), logits)
        assert (gradient.data_ptr() == logits.data_ptr()) == inplace
        gradients.append(gradient)
    assert torch.equal(*gradients)


def test_gradient_in_place_is_noticed_by_other_users_of_the_logits() -> None:
    case = random_case()
    logits = case.student.clone().requires_grad_() * 1
    stats = vocab_parallel_divergence(logits, case.teacher, inplace_backward=True)
    stats.divergence.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stats.divergence.sum().backward()


def test_log_probability_alone_can_be_differentiated() -> None:
    case = random_case(vocab_size=83)
    student = case.student.clone().requires_grad_()
    stats = vocab_parallel_divergence(student, case.teacher, targets=case.targets, **case.options)
    assert stats.student_logprob is not None
    (gradient,) = torch.autograd.grad((stats.student_logprob * case.logprob_grad).sum(), student)
    case.divergence_grad.zero_()
    torch.testing.assert_close(gradient, case.truth()[1], rtol=1e-12, atol=1e-12)


def test_strided_logits_and_mixed_dtypes() -> None:
    case = random_case()
    student = case.student.float().t().contiguous().t().requires_grad_()
    teacher = case.teacher.bfloat16()[:, None].expand(-1, 2, -1)[:, 1]
    stats = vocab_parallel_divergence(student, teacher)
    truth = reference.vocab_parallel_divergence(student.detach(), teacher).divergence
    torch.testing.assert_close(stats.divergence.double(), truth, rtol=2e-5, atol=2e-5)
    assert stats.divergence.dtype == torch.float32


def test_what_was_not_asked_for_is_none() -> None:
    case = random_case()
    stats = vocab_parallel_divergence(case.student, case.teacher)
    assert [stats.student_logprob, stats.teacher_logprob] == [None, None]
    assert [stats.student_entropy, stats.teacher_entropy] == [None, None]
    with pytest.raises(ValueError, match="needs the targets"):
        _ = stats.log_gap


def test_targets_outside_the_vocabulary() -> None:
    case = random_case(count=3, vocab_size=83)
    stats = vocab_parallel_divergence(
        case.student, case.teacher, targets=torch.tensor([-100, 83, 96]), **case.options
    )
    assert stats.student_logprob is not None and (stats.student_logprob == -torch.inf).all()


def test_teacher_excludes_an_id() -> None:
    case = random_case(count=3)
    case.teacher[1, 2] = -torch.inf
    student = case.student.clone().requires_grad_()
    stats = vocab_parallel_divergence(student, case.teacher)
    assert stats.divergence.isinf().tolist() == [False, True, False]
    stats.divergence.sum().backward()
    assert student.grad is not None and not student.grad[1].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "forward"}, "unknown divergence kind 'forward'; supported: reverse_kl"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": math.nan}, "temperature must be positive"),
        ({"vocab_size": 97}, "vocab_size must be between 1 and 96"),
        ({"vocab_size": 0}, "vocab_size must be between 1 and 96"),
        ({"targets": torch.zeros(12, dtype=torch.int64)}, r"targets must have shape \(13,\)"),
        ({"teacher_logits": torch.zeros(13, 95)}, r"same ids, not \(13, 96\) and \(13, 95\)"),
        ({"student_logits": torch.zeros(1, 13, 96)}, r"must be \[N, V/TP\] shards"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    case = random_case()
    arguments: dict[str, object] = {"student_logits": case.student, "teacher_logits": case.teacher}
    with pytest.raises(ValueError, match=message):
        vocab_parallel_divergence(**(arguments | change))  # type: ignore[arg-type]
