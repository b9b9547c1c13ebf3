"""A teacher that gives log-probs instead of logits: the same loss and gradient, no claim that it cannot back."""

from typing import Any

import pytest
import torch

from megatron_opd.objectives import (
    Gate,
    Objective,
    PolicyGradient,
    ServedLogprobs,
    TokenWeight,
    likeliest,
    served_logprobs,
)

N, V, K = 12, 40, 5
MASK = torch.ones(N, dtype=torch.bool)
OFFSETS = torch.tensor([0, 5, N], dtype=torch.int32)
TOPK: dict[str, Any] = {"support": "teacher_topk", "k": K}
AOPD = {
    "divergence": "policy_gradient",
    "gate": Gate("aopd", divergence="forward_kl"),
    "remainder": "none",
    **TOPK,
}


def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student, teacher, targets."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(N, V, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(V, (N,), generator=generator)


def serve(teacher: torch.Tensor, targets: torch.Tensor, ids: torch.Tensor | None) -> ServedLogprobs:
    """What a server says of these logits: at temperature 1."""
    logprobs = teacher.log_softmax(-1)
    sampled = logprobs.gather(1, targets[:, None])[:, 0]
    return ServedLogprobs(sampled, ids, None if ids is None else logprobs.gather(1, ids))


def loss_of(objective: Objective, *, served: bool) -> tuple[dict[str, float], torch.Tensor]:
    """(sums, gradient of the student's logits)."""
    student, logits_t, targets = logits()
    teacher: torch.Tensor | ServedLogprobs = logits_t
    if served:
        ids = None
        if objective.support != "full":
            model = student if objective.support.startswith("student") else logits_t
            ids = model.detach().topk(K).indices
        teacher = serve(logits_t, targets, ids)
    stats = objective.token_stats(student, teacher, targets)
    loss, values = objective.loss(stats, torch.arange(N), MASK, OFFSETS)
    loss.backward()
    assert student.grad is not None
    return {name: float(value_N.sum()) for name, value_N in values.items()}, student.grad


@pytest.mark.parametrize(
    "settings",
    [
        {"divergence": "policy_gradient"},
        {"divergence": "policy_gradient", "policy": PolicyGradient(discount=1.0)},
        {"divergence": "policy_gradient", "token_weight": TokenWeight("cumulative_share", gamma=0.5)},
        TOPK,
        {**TOPK, "temperature": 0.7},
        {**TOPK, "temperature": 0.7, "support": "teacher_topk_sampled", "divergence": "forward_kl"},
        {**TOPK, "temperature": 0.7, "token_weight": TokenWeight("linear_decay")},
        {**TOPK, "remainder": "bucket", "support": "teacher_topk_sampled"},
        {**TOPK, "remainder": "sampled_tail"},
        {**TOPK, "remainder": "mass_correction", "support": "student_topk"},
        AOPD,
    ],
)
def test_loss_and_gradient_are_those_of_the_logits(settings: dict[str, Any]) -> None:
    expected, gradient = loss_of(Objective(**settings), served=False)
    sums, found = loss_of(Objective(served_at=1.0, **settings), served=True)
    torch.testing.assert_close(found, gradient, atol=1e-12, rtol=1e-9)
    known = set(sums) - {"reverse_kl_sampled"}
    assert {name: sums[name] for name in known} == pytest.approx({name: expected[name] for name in known})
    unknown = {"reverse_kl", "teacher_entropy"}
    if settings.get("temperature", 1.0) == 1.0:
        assert sums["reverse_kl_sampled"] == pytest.approx(-expected["log_gap"])
    else:
        unknown |= {"log_gap", "abs_log_gap"} | ({"teacher_mass"} if "support" in settings else set())
    assert set(expected) - set(sums) == unknown


def test_the_names_of_the_values_are_known_before_them() -> None:
    for objective in (Objective(served_at=1.0, **TOPK), Objective(served_at=1.0, temperature=0.5, **TOPK)):
        assert tuple(loss_of(objective, served=True)[0]) == objective.value_names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "support: reverse_kl over the full vocabulary .*: use policy_gradient, or"),
        ({"divergence": "forward_kl"}, "support: forward_kl over the full vocabulary"),
        ({"divergence": "jsd"}, "support: jsd over the full vocabulary"),
        (
            {**AOPD, "gate": Gate("teacher_entropy", divergence="forward_kl")},
            "gate.kind: teacher_entropy needs",
        ),
        (
            {"divergence": "policy_gradient", "policy": PolicyGradient(baseline="reverse_kl")},
            "policy.baseline: ",
        ),
        (
            {"divergence": "policy_gradient", "policy": PolicyGradient(discount=1.0, exact_step=True)},
            "policy.exact_step: ",
        ),
        (
            {"divergence": "policy_gradient", "temperature": 0.7},
            "divergence: policy_gradient reads .* to 1, at which",
        ),
        ({**AOPD, "temperature": 0.7}, "divergence: policy_gradient reads"),
        (
            {**TOPK, "remainder": "bucket", "temperature": 0.7},
            "remainder: bucket reads .* set it to renormalize",
        ),
        (
            {**TOPK, "token_weight": TokenWeight("cumulative_share", gamma=0.5), "temperature": 0.7},
            "token_weight.kind: cumulative_share reads .* set it to uniform",
        ),
    ],
)
def test_what_needs_more_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(served_at=1.0, **settings)
    Objective(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"divergence": "policy_gradient", "token_weight": TokenWeight("prefix_ratio")},
        {**TOPK, "remainder": "bucket", "token_weight": TokenWeight("cumulative_share", gamma=0.5)},
        {**TOPK, "remainder": "sampled_tail"},
        AOPD,
    ],
)
def test_log_probs_at_the_temperature_of_the_rollouts_are_as_good_as_logits(settings: dict[str, Any]) -> None:
    expected, gradient = loss_of(Objective(temperature=0.7, **settings), served=False)
    student, teacher, targets = logits()
    k = K if "support" in settings else 0
    served = served_logprobs(teacher, targets, k, temperature=0.7)
    objective = Objective(temperature=0.7, served_at=0.7, **settings)
    loss, values = objective.loss(
        objective.token_stats(student, served, targets), torch.arange(N), MASK, OFFSETS
    )
    loss.backward()
    torch.testing.assert_close(student.grad, gradient, atol=1e-12, rtol=1e-9)
    assert set(expected) - set(values) == {"reverse_kl", "teacher_entropy"}
    for name in set(values) - {"reverse_kl_sampled"}:
        assert float(values[name].sum()) == pytest.approx(expected[name], abs=1e-12), name


def test_a_teacher_that_is_nan_is_named_where_logits_are_judged() -> None:
    student, teacher, targets = logits()
    teacher[4, 7] = torch.nan
    for k in (0, K):
        objective = (
            Objective("policy_gradient", served_at=1.0) if k == 0 else Objective(served_at=1.0, **TOPK)
        )
        served = served_logprobs(teacher, targets, k)
        objective.token_stats(student, served, targets)
        with pytest.raises(
            FloatingPointError, match=r"teacher log-probs are NaN at 1 of 12 tokens, .* token 4"
        ):
            objective.token_stats(student, served, targets, check=True)


def test_the_likeliest_ids() -> None:
    student, _, targets = logits()
    best = student.detach()[:, :30].topk(K)
    assert torch.equal(likeliest(student.detach(), K, vocab_size=30), best.indices)
    served = served_logprobs(student.detach(), targets % 30, K, vocab_size=30)
    assert served.ids is not None and served.ids.dtype == torch.int32
    assert torch.equal(served.ids.long(), best.indices)
