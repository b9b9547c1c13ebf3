"""Rollouts of older weights: estimators on the sampled tokens are corrected by the ratio, divergences need none."""

from pathlib import Path

import pytest
import torch

from megatron_opd.config.schema import OptimizerConfig
from megatron_opd.data.rollouts import Rollout
from megatron_opd.objectives import Objective, PolicyGradient
from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.training.score import sampled_logprobs
from tests.gloo_pool import GlooPools
from tests.tiny import VOCAB, recorded_rollouts
from tests.training.tiny_run import TinyRun, build_run

CAP = 1.05
SAMPLED = Objective(divergence="policy_gradient", policy=PolicyGradient(importance_cap=CAP))


def drawn_now(run: TinyRun, rollouts: list[Rollout]) -> list[Rollout]:
    """The rollouts with the log-probs that the student of now gives their tokens."""
    scored = []
    for each in rollouts:
        ((microbatch,),) = run.pack([each])
        (logprobs,) = sampled_logprobs(
            run.student.ddps,
            run.student.chunks[-1],
            [microbatch],
            run.groups,
            temperature=1.0,
            vocab_size=VOCAB,
            chunk_size=None,
        )
        assert logprobs is not None
        scored.append(
            Rollout(each.prompt_id, 0, each.prompt_ids, each.response_ids, logprobs.tolist(), "length", 0)
        )
    return scored


def before_and_after_a_step(
    models: Path, objective: Objective
) -> dict[str, tuple[dict[str, float], torch.Tensor]]:
    """(statistics, gradients) of rollouts by the student itself, and after a step by the old and by the new one."""
    optimizer = OptimizerConfig(lr=1e-2, distributed=False)
    run = build_run(ParallelLayout(), models, objective=objective, optimizer=optimizer)
    old = drawn_now(run, recorded_rollouts(5))

    def outcome(rollouts: list[Rollout]) -> tuple[dict[str, float], torch.Tensor]:
        sums = run.accumulate(run.pack(rollouts))
        return sums, torch.cat([gradient.flatten() for gradient in run.gradients().values()])

    results = {"first": outcome(old)}
    run.student.start_step()
    assert run.student.apply_gradients()[1]
    new = drawn_now(run, old)
    results |= {"stale": outcome(old), "fresh": outcome(new)}
    ratios = [
        min(CAP, torch.tensor(now - then).exp().item())
        for ours, theirs in zip(new, old, strict=True)
        for now, then in zip(ours.logprobs, theirs.logprobs, strict=True)
    ]
    results["ratios"] = ({"sum": sum(ratios), "count": len(ratios)}, torch.tensor(ratios))
    return results


def test_sampled_tokens_count_by_the_truncated_ratio(gloo: GlooPools, models: Path) -> None:
    results = gloo(1, before_and_after_a_step, models, SAMPLED)[0]
    count, ratios = results["ratios"][0]["count"], results["ratios"][1]
    for name in ("first", "fresh"):
        assert results[name][0]["importance"] == pytest.approx(count, abs=1e-3), name
    assert results["stale"][0]["importance"] == pytest.approx(results["ratios"][0]["sum"], abs=1e-3)
    assert (ratios == CAP).any() and (ratios < 0.95).any(), "some are truncated, some count less"
    (_, stale), (_, fresh) = results["stale"], results["fresh"]
    assert (stale - fresh).norm() > 0.01 * fresh.norm()


def test_a_divergence_does_not_ask_who_drew(gloo: GlooPools, models: Path) -> None:
    results = gloo(1, before_and_after_a_step, models, Objective())[0]
    (stale_sums, stale), (fresh_sums, fresh) = results["stale"], results["fresh"]
    assert torch.equal(stale, fresh)
    stale_sums, fresh_sums = (
        {name: value for name, value in sums.items() if not name.startswith("logprob_mismatch")}
        for sums in (stale_sums, fresh_sums)
    )
    assert stale_sums == fresh_sums and "reverse_kl" in stale_sums
