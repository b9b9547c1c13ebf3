"""The loss of a microbatch against the reference: value and gradient of every shard, and the sums.

Tensor parallel x context parallel x every preset's kind of objective, on-policy and off-policy.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.objectives import (
    Gate,
    LinearLogits,
    Objective,
    PolicyGradient,
    Shaping,
    TokenWeight,
    reference,
    zigzag_positions,
)
from tests.gloo_pool import GlooPools
from tools.bench.traffic import recorded_traffic

SHARE = TokenWeight(kind="cumulative_share")
SAMPLED = Objective(divergence="policy_gradient")
OBJECTIVES = {
    "reverse_kl": Objective(),
    "cold": Objective(temperature=0.7),
    "shared": Objective(token_weight=SHARE),
    "unit mean": Objective(
        token_weight=TokenWeight("cumulative_share", 2.0, unit_mean=True), temperature=1.3
    ),
    "forward_kl": Objective(divergence="forward_kl", token_weight=TokenWeight("curriculum")),
    "jsd": Objective(divergence="jsd", beta=0.3, token_weight=TokenWeight("suffix_window", floor=0.0)),
    "lsm": Objective(support="teacher_topk", k=5),
    "mopd": Objective(support="student_topk_sampled", k=5, remainder="mass_correction"),
    "tail": Objective(support="student_topk", k=5, remainder="sampled_tail", token_weight=SHARE),
    "bucket": Objective("forward_kl", support="teacher_topk", k=5, remainder="bucket"),
    "opd": SAMPLED,
    "iw-opd": Objective("policy_gradient", token_weight=SHARE, temperature=0.9),
    "aopd": Objective(
        "policy_gradient", support="teacher_topk", k=5, remainder="none", gate=Gate("aopd", -0.05)
    ),
    "eopd": Objective(
        "policy_gradient",
        support="teacher_topk",
        k=5,
        remainder="none",
        gate=Gate("teacher_entropy", threshold=1.2, coefficient=0.7),
    ),
    "exopd": Objective("policy_gradient", shaping=Shaping(reference_weight=1.25), token_weight=SHARE),
    "poweropd": Objective("policy_gradient", shaping=Shaping(power=5.0)),
    "minillm": Objective(
        "policy_gradient", policy=PolicyGradient(discount=1.0, exact_step=True, length_normalized=True)
    ),
    "discount": Objective("policy_gradient", policy=PolicyGradient(discount=0.7), token_weight=SHARE),
    "baseline": Objective(
        "policy_gradient", policy=PolicyGradient(baseline="reverse_kl", importance_cap=1.1)
    ),
}
# Four responses of 8, 4, 8 and 4 positions; one is fully masked, one has a single token, one masked ones inside.
CU_SEQLENS = torch.tensor([0, 8, 12, 20, 24], dtype=torch.int32)
MASK = torch.zeros(24, dtype=torch.bool)
MASK[[2, 3, 4, 6, 7, 13, 14, 15, 16, 18, 22]] = True
VOCAB, PADDED = 21, 24


def packed_inputs(off_policy: bool) -> dict[str, Tensor]:
    """Logits [24, 24], targets, and the log-probabilities of engine, old student and reference policy."""
    torch.manual_seed(1)
    student, teacher = 2 * torch.randn(2, len(MASK), PADDED, dtype=torch.float64)
    targets = torch.randint(VOCAB, (len(MASK),))
    student[MASK, targets[MASK]] += 1.0  # sampled tokens are rather likely ones
    exact = torch.log_softmax(student[:, :VOCAB], 1).gather(1, targets[:, None])[:, 0]
    noise = torch.randn(3, len(MASK), dtype=torch.float64)
    inputs = {
        "student": student,
        "teacher": teacher,
        "targets": targets,
        "rollout": exact + 0.1 * noise[0],
        "reference": exact + noise[1],
    }
    return inputs | ({"old": exact + 0.3 * noise[2]} if off_policy else {})


def grid(tensor: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's tensor-parallel group (neighbours) and context-parallel group."""
    world, rank = dist.get_world_size(), dist.get_rank()
    tensors = [dist.new_group(list(range(i, i + tensor))) for i in range(0, world, tensor)]
    contexts = [dist.new_group(list(range(i, world, tensor))) for i in range(tensor)]
    return tensors[rank // tensor], contexts[rank % tensor]


def run(objective: Objective, tensor: int, off_policy: bool, everywhere: bool) -> tuple[Any, ...]:
    """Loss part, sums, positions and columns of this rank, their gradient, and collectives of the loss."""
    tp, cp = grid(tensor)
    inputs = packed_inputs(off_policy)
    width = PADDED // tensor
    columns = slice(tp.rank() * width, (tp.rank() + 1) * width)
    mine = zigzag_positions(CU_SEQLENS, cp.rank(), cp.size())
    local = {name: tensor[mine] for name, tensor in inputs.items()}
    mask = MASK[mine]
    shard = local["student"][:, columns].clone().requires_grad_()
    positions = torch.arange(len(mine)).flip(0) if everywhere else mask.nonzero()[:, 0]
    rollout = local["rollout"][positions]
    stats = objective.token_stats(
        shard[positions],
        local["teacher"][:, columns][positions],
        local["targets"][positions],
        rollout_logprob_N=rollout,
        vocab_size=VOCAB,
        group=tp,
    )
    with recorded_traffic() as calls:
        loss, values = objective.loss(
            stats,
            positions,
            mask,
            CU_SEQLENS,
            rollout_logprob_N=rollout,
            old_logprob_N=local["old"][positions] if off_policy else None,
            reference_logprob_N=local["reference"][positions],
            progress=0.4,
            group=cp,
        )
    loss.backward()
    assert shard.grad is not None
    sums = {name: value_N.sum() for name, value_N in values.items()}
    return loss.detach(), sums, mine, columns, shard.grad, len(calls)


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_equals_reference(gloo: GlooPools, name: str, tensor: int, context: int, off_policy: bool) -> None:
    objective = OBJECTIVES[name]
    inputs = packed_inputs(off_policy)
    student = inputs["student"].clone().requires_grad_()
    truth = reference.loss(
        objective,
        student,
        inputs["teacher"],
        inputs["targets"],
        MASK,
        CU_SEQLENS,
        rollout_logprob=inputs["rollout"],
        old_logprob=inputs.get("old"),
        reference_logprob=inputs["reference"],
        progress=0.4,
        vocab_size=VOCAB,
    )
    truth.backward()
    assert student.grad is not None and student.grad.abs().max() > 1e-3
    everywhere = off_policy  # the loss positions, or all of them in another order
    results = gloo(tensor * context, run, objective, tensor, off_policy, everywhere)
    gradient = torch.full_like(student, torch.nan)
    for _, _, positions, columns, part, _ in results:
        gradient[positions[:, None], torch.arange(PADDED)[None, columns]] = part
    torch.testing.assert_close(gradient, student.grad, rtol=1e-10, atol=1e-10)
    by_context = results[::tensor]
    total = torch.stack([result[0] for result in by_context]).sum()
    torch.testing.assert_close(total, truth.detach(), rtol=1e-10, atol=1e-10)
    summed = sum(result[1]["loss"] for result in by_context)
    torch.testing.assert_close(summed, truth.detach(), rtol=1e-10, atol=1e-10)
    looks_along = objective.token_weight.kind != "uniform" or objective.policy.discount > 0
    assert {result[5] for result in results} == {int(context > 1 and looks_along)}
    assert all(tuple(result[1]) == objective.value_names for result in results)


def test_values(gloo: GlooPools) -> None:
    inputs = packed_inputs(off_policy=False)
    stats = reference.vocab_parallel_divergence(
        inputs["student"], inputs["teacher"], targets=inputs["targets"], temperature=1.3, vocab_size=VOCAB
    )
    assert stats.reverse_kl is not None
    weights = reference.token_weights(stats.log_gap, MASK, CU_SEQLENS, gamma=2.0, unit_mean=True)
    expected = {
        "loss": (weights * stats.divergence)[MASK].sum().item(),
        "reverse_kl": stats.reverse_kl[MASK].sum().item(),
        "weight": weights.sum().item(),
        "log_gap": stats.log_gap[MASK].sum().item(),
        "abs_log_gap": stats.log_gap[MASK].abs().sum().item(),
    }
    for name in ("student_logprob", "student_entropy", "teacher_entropy"):
        expected[name] = getattr(stats, name)[MASK].sum().item()
    assert expected["weight"] == pytest.approx(11.0)
    for everywhere in (False, True):
        _, sums, *_ = gloo(1, run, OBJECTIVES["unit mean"], 1, False, everywhere)[0]
        assert {name: value.item() for name, value in sums.items()} == pytest.approx(expected, abs=1e-12)
        assert not any(value.requires_grad for value in sums.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_masked_positions_may_hold_nan(name: str) -> None:
    inputs = packed_inputs(off_policy=True)
    results = []
    for value in (0.0, torch.nan):
        teacher, old = inputs["teacher"].clone(), inputs["old"].clone()
        teacher[~MASK], old[~MASK] = value, value
        student = inputs["student"].clone().requires_grad_()
        objective = OBJECTIVES[name]
        stats = objective.token_stats(student, teacher, inputs["targets"], vocab_size=VOCAB)
        positions = torch.arange(len(MASK))
        loss, values = objective.loss(
            stats,
            positions,
            MASK,
            CU_SEQLENS,
            old_logprob_N=old,
            reference_logprob_N=torch.where(MASK, inputs["reference"], value),
        )
        (gradient,) = torch.autograd.grad(loss, student)
        results.append((loss, values, gradient[MASK]))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_empty_microbatch(name: str) -> None:
    objective = OBJECTIVES[name]
    shard = torch.randn(8, 5, requires_grad=True)
    positions, mask = torch.zeros(0, dtype=torch.int64), torch.zeros(8, dtype=torch.bool)
    stats = objective.token_stats(shard[positions], torch.zeros(0, 5), positions)
    loss, values = objective.loss(
        stats, positions, mask, torch.tensor([0, 8]), reference_logprob_N=torch.zeros(0)
    )
    (gradient,) = torch.autograd.grad(loss, shard)
    assert loss.item() == 0.0 and (gradient == 0.0).all()
    assert all(value_N.shape == (0,) for value_N in values.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_chunks_of_a_head_change_nothing(name: str) -> None:
    torch.manual_seed(3)
    objective = OBJECTIVES[name]
    inputs = packed_inputs(off_policy=True)
    hidden, other = torch.randn(2, len(MASK), 6, dtype=torch.float64)
    heads = torch.randn(2, PADDED, 6, dtype=torch.float64)
    results = []
    for chunk in (None, 5):
        states, head = hidden.clone().requires_grad_(), heads[0].clone().requires_grad_()
        student: Tensor | LinearLogits = states @ head.T if chunk is None else LinearLogits(states, head)
        teacher: Tensor | LinearLogits = (
            other @ heads[1].T if chunk is None else LinearLogits(other, heads[1])
        )
        options = {"vocab_size": VOCAB, "chunk_size": chunk, "rollout_logprob_N": inputs["rollout"]}
        stats = objective.token_stats(student, teacher, inputs["targets"], **options)  # type: ignore[arg-type]
        loss, _ = objective.loss(
            stats,
            torch.arange(len(MASK)),
            MASK,
            CU_SEQLENS,
            old_logprob_N=inputs["old"],
            reference_logprob_N=inputs["reference"],
        )
        results.append((loss, *torch.autograd.grad(loss, [states, head])))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_teacher_equal_to_student_teaches_nothing() -> None:
    inputs = packed_inputs(off_policy=False)
    for name, objective in OBJECTIVES.items():
        if objective.remainder == "none" or name == "exopd":
            continue  # not a divergence; a reference policy that is another model
        student = inputs["student"].clone().requires_grad_()
        stats = objective.token_stats(student, inputs["student"], inputs["targets"], vocab_size=VOCAB)
        loss, values = objective.loss(stats, torch.arange(len(MASK)), MASK, CU_SEQLENS)
        (gradient,) = torch.autograd.grad(loss, student)
        assert abs(loss.item()) < 1e-13 and gradient.abs().max() < 1e-13, name
        assert values["abs_log_gap"].sum().item() < 1e-12


def test_gates_at_their_ends_are_opd_and_topk_forward_kl() -> None:
    inputs = packed_inputs(off_policy=True)

    def gradient(objective: Objective) -> Tensor:
        student = inputs["student"].clone().requires_grad_()
        stats = objective.token_stats(student, inputs["teacher"], inputs["targets"], vocab_size=VOCAB)
        positions = torch.arange(len(MASK))
        loss, _ = objective.loss(stats, positions, MASK, CU_SEQLENS, old_logprob_N=inputs["old"])
        return torch.autograd.grad(loss, student)[0]

    def aopd(tau: float) -> Objective:
        gate = Gate("aopd", tau)
        return Objective("policy_gradient", support="teacher_topk", k=5, remainder="none", gate=gate)

    forward = Objective("forward_kl", support="teacher_topk", k=5, remainder="none")
    torch.testing.assert_close(gradient(aopd(-1.0)), gradient(SAMPLED), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(aopd(1.0)), gradient(forward), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "jeffreys"}, "divergence: unknown 'jeffreys'"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"support": "teacher_topk", "k": 0}, "k: must be at least 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**settings)
