"""The loss of a microbatch against the reference: value, gradient under tensor parallelism, and the sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.objectives import Objective, reference
from tests.gloo_pool import GlooPools

OBJECTIVES = [
    Objective(),
    Objective(temperature=0.7),
    Objective(token_weight="cumulative_share"),
    Objective(token_weight="cumulative_share", gamma=2.0, unit_mean=True, temperature=1.3),
]
# Three responses of 5, 4 and 6 positions in a buffer of 18; one is fully masked, the last 3 positions are
# padding.
CU_SEQLENS = torch.tensor([0, 5, 9, 15, 18], dtype=torch.int32)
MASK = torch.zeros(18, dtype=torch.bool)
MASK[[2, 3, 4, 10, 12, 13]] = True
VOCAB, PADDED = 21, 24


def packed_logits() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    student, teacher = 3 * torch.randn(2, len(MASK), PADDED, dtype=torch.float64)
    return student, teacher, torch.randint(VOCAB, (len(MASK),)).where(MASK, 0)


def run(objective: Objective, positions: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, sums, and this rank's columns of the gradient of the whole buffer's logits."""
    student, teacher, targets = packed_logits()
    width = PADDED // dist.get_world_size()
    columns = slice(dist.get_rank() * width, (dist.get_rank() + 1) * width)
    shard = student[:, columns].clone().requires_grad_()
    stats = objective.token_stats(
        shard[positions],
        teacher[:, columns][positions],
        targets[positions],
        vocab_size=VOCAB,
        group=dist.group.WORLD,
    )
    loss, sums = objective.loss(stats, positions, MASK, CU_SEQLENS)
    loss.backward()
    assert shard.grad is not None
    return loss.detach(), sums, shard.grad


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_equals_reference(gloo: GlooPools, objective: Objective, world_size: int) -> None:
    student, teacher, targets = packed_logits()
    student.requires_grad_()
    settings: dict[str, Any] = vars(objective)
    truth = reference.loss(student, teacher, targets, MASK, CU_SEQLENS, vocab_size=VOCAB, **settings)
    truth.backward()
    assert student.grad is not None
    for positions in (
        MASK.nonzero()[:, 0],
        torch.arange(18).flip(0),
    ):  # the loss positions, or all, in any order
        results = gloo(world_size, run, objective, positions)
        for loss, sums, _ in results:
            torch.testing.assert_close(loss, truth.detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(sums["loss"], truth.detach(), rtol=1e-12, atol=1e-12)
        gradient = torch.cat([result[2] for result in results], dim=1)
        torch.testing.assert_close(gradient, student.grad, rtol=1e-12, atol=1e-12)


def test_sums(gloo: GlooPools) -> None:
    student, teacher, targets = packed_logits()
    stats = reference.vocab_parallel_divergence(
        student, teacher, targets=targets, temperature=1.3, vocab_size=VOCAB
    )
    weights = reference.token_weights(stats.log_gap, MASK, CU_SEQLENS, gamma=2.0, unit_mean=True)
    expected = {
        "tokens": 6.0,
        "loss": (weights * stats.divergence)[MASK].sum().item(),
        "reverse_kl": stats.divergence[MASK].sum().item(),
        "weight": weights.sum().item(),
        "log_gap": stats.log_gap[MASK].sum().item(),
        "abs_log_gap": stats.log_gap[MASK].abs().sum().item(),
    }
    assert expected["weight"] == pytest.approx(6.0)
    for positions in (MASK.nonzero()[:, 0], torch.arange(18)):
        _, sums, _ = gloo(1, run, OBJECTIVES[3], positions)[0]
        assert {name: value.item() for name, value in sums.items()} == pytest.approx(expected, abs=1e-12)
        assert not any(value.requires_grad for value in sums.values())


def test_masked_positions_may_hold_nan() -> None:
    student, teacher, targets = packed_logits()
    objective = OBJECTIVES[3]
    results = []
    for value in (0.0, torch.nan):
        teacher[~MASK] = value
        stats = objective.token_stats(student, teacher, targets, vocab_size=VOCAB)
        loss, sums = objective.loss(stats, torch.arange(18), MASK, CU_SEQLENS)
        results.append((loss, sums))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_empty_microbatch() -> None:
    shard = torch.randn(8, 5, requires_grad=True)
    positions, mask = torch.zeros(0, dtype=torch.int64), torch.zeros(8, dtype=torch.bool)
    for objective in OBJECTIVES:
        stats = objective.token_stats(shard[positions], torch.zeros(0, 5), positions)
        loss, sums = objective.loss(stats, positions, mask, torch.tensor([0, 8]))
        (gradient,) = torch.autograd.grad(loss, shard)
        assert loss.item() == 0.0 and (gradient == 0.0).all()
        assert all(value.item() == 0.0 for value in sums.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "jeffreys"}, "unknown divergence 'jeffreys'; supported: reverse_kl"),
        ({"token_weight": "late"}, "unknown token weight 'late'; supported: uniform, cumulative_share"),
        ({"gamma": -1.0}, "gamma must not be negative"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**settings)
