"""Log-prob agreement of rollout and training: what is measured, when, over all ranks; the alarm; replay of kept ids."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.config.rollout import RolloutConfig
from megatron_opd.train import train_step
from megatron_opd.training.agreement import MAXIMA, SUMS, agreement, alarm, step_agreement
from megatron_opd.training.evaluating import evaluate
from tests.gloo_pool import GlooPools
from tests.training.test_job import build, inputs, steps

__all__ = ["inputs"]

TOP_P = {"rollout__top_p": 0.8, "rollout__temperature": 1.1}
KEPT = {**TOP_P, "objective__kept_ids_only": True}


@given(st.lists(st.floats(-3, 0), min_size=1, max_size=9), st.floats(0.01, 2), st.data())
def test_numbers_of_a_microbatch(rollout: list[float], threshold: float, data: st.DataObject) -> None:
    gaps = data.draw(st.lists(st.floats(-1, 1), min_size=len(rollout), max_size=len(rollout)))
    rollout_N = torch.tensor(rollout, dtype=torch.float64)
    gap_N = rollout_N + torch.tensor(gaps, dtype=torch.float64) - rollout_N
    found = {name: float(each) for name, each in agreement(rollout_N + gap_N, rollout_N, threshold).items()}
    sizes = [abs(gap) for gap in gap_N.tolist()]
    assert found["logprob_mismatch"] == pytest.approx(sum(sizes))
    assert found["logprob_mismatch_max"] == pytest.approx(max(sizes))
    assert found["logprob_mismatch_high"] == pytest.approx(sum(size > threshold for size in sizes), abs=0.1)
    assert found["compared_tokens"] == len(rollout)
    ratios = [math.exp(gap) - 1 - gap for gap in gap_N.tolist()]
    assert found["logprob_mismatch_kl"] == pytest.approx(sum(ratios), abs=1e-12)


def test_the_kl_is_that_of_rollout_and_training() -> None:
    """Expected over tokens that the rollout engine draws."""
    rollout_V, training_V = torch.randn(2, 50, dtype=torch.float64).log_softmax(1)
    expected = torch.stack(
        [
            agreement(training_V[v, None], rollout_V[v, None], 1.0)["logprob_mismatch_kl"]
            for v in range(len(rollout_V))
        ]
    )
    kl = (rollout_V.exp() * (rollout_V - training_V)).sum()
    torch.testing.assert_close((rollout_V.exp() * expected).sum(), kl)


def test_nan_counts_as_high_and_what_cannot_be_compared_as_nothing() -> None:
    rollout_N = torch.tensor([-1.0, -2.0])
    found = agreement(torch.tensor([torch.nan, -2.0]), rollout_N, 0.5)
    assert found["logprob_mismatch_high"] == 1.0 and found["logprob_mismatch_max"].isnan()
    moved = agreement(None, rollout_N, 0.5)
    assert set(moved) == {*SUMS, *MAXIMA} and not any(moved.values())
    empty = agreement(torch.zeros(0), torch.zeros(0), 0.5)
    assert not any(empty.values())


def test_a_step_compares_the_tokens_that_it_can() -> None:
    first = dict(zip((*SUMS, *MAXIMA), (2.0, 1.0, 3.0, 4.0, 0.7), strict=True))
    moved = dict.fromkeys((*SUMS, *MAXIMA), 0.0)
    expected = {"logprob_mismatch": 0.5, "logprob_mismatch_kl": 0.25, "logprob_mismatch_high": 0.75}
    assert step_agreement([first, moved]) == expected | {"logprob_mismatch_max": 0.7}
    assert step_agreement([moved]) == {} == step_agreement([])


METRICS = {
    "logprob_mismatch": 0.2,
    "logprob_mismatch_max": 3.5,
    "logprob_mismatch_kl": 0.1,
    "logprob_mismatch_high": 0.05,
}


def test_the_alarm_names_numbers_and_causes() -> None:
    line = alarm(METRICS, RolloutConfig(mismatch_threshold=0.4, mismatch_alarm=0.04, engine="sglang"))
    assert line is not None and "\n" not in line
    for part in (
        "5.0% of the tokens",
        "0.4 nats",
        "mismatch_alarm 4.0%",
        "mean 0.2",
        "largest 3.5",
        "KL 0.1",
    ):
        assert part in line
    for cause in ("precision", "server arguments", "weights"):
        assert cause in line
    assert "server" not in (alarm(METRICS, RolloutConfig()) or "")


@pytest.mark.parametrize("allowed", [0.05, 0.5, None])
def test_no_alarm_where_enough_agree(allowed: float | None) -> None:
    assert alarm(METRICS, RolloutConfig(mismatch_alarm=allowed)) is None
    assert alarm({"loss": 1.0}, RolloutConfig(mismatch_alarm=0.0)) is None


def after_a_large_step(folder: Path, run_dir: Path, preset: str) -> tuple[dict[str, float], float]:
    """The metrics of a step of two updates, the first of which moves the student far; and how far the second is."""
    job = build(
        folder, run_dir, training__updates_per_rollout=2, optimizer__lr=0.05, objective__preset=preset
    )
    rollouts = job.draw(job.prompts.take(4), step=0, seed=0, samples=1)
    metrics, *_ = train_step(job, 1)
    (update,) = [job.packed(rollouts)]
    scored = job._logprobs(job.student.ddps, job.student.chunks[-1], update.microbatches)
    gaps = [
        (logprob_N - microbatch.rollout_logprobs_T[microbatch.mask_T]).abs().max()
        for logprob_N, microbatch in zip(scored, update.microbatches, strict=True)
        if logprob_N is not None
    ]
    return metrics, float(torch.stack(gaps).max())


@pytest.mark.parametrize("preset", ["opd", "gkd"])  # with stored old log-probs, and without
def test_log_probs_are_compared_before_the_student_moves(
    gloo: GlooPools, inputs: Path, tmp_path: Path, preset: str
) -> None:
    metrics, moved = gloo(1, after_a_large_step, inputs, tmp_path / "run", preset)[0]
    assert metrics["logprob_mismatch_max"] < 1e-4 and moved > 0.1
    assert 0.0 < metrics["logprob_mismatch"] <= metrics["logprob_mismatch_max"]
    assert abs(metrics["logprob_mismatch_kl"]) < 1e-8 and metrics["logprob_mismatch_high"] == 0.0


def what_is_recorded(folder: Path, run_dir: Path, **changes: Any) -> list[int]:
    """Tokens with kept ids in rollouts that are trained on and in others; and of the held-out evaluation."""
    job = build(folder, run_dir, **changes)
    prompts = job.prompts.take(2)
    draws = [job.draw(prompts, step=0, seed=0, samples=1, trained=trained) for trained in (True, False)]
    assert evaluate(job, 0)["eval/reverse_kl"] > 0.0
    return [sum(len(rollout.kept_ids) for rollout in rollouts) for rollouts in draws]


def test_kept_ids_are_recorded_where_they_are_read(gloo: GlooPools, inputs: Path, tmp_path: Path) -> None:
    (replayed, heldout) = gloo(1, what_is_recorded, inputs, tmp_path / "replay", **KEPT)[0]
    assert replayed > 0 and heldout == 0
    assert gloo(1, what_is_recorded, inputs, tmp_path / "plain", **TOP_P)[0] == [0, 0]


@pytest.mark.parametrize("preset", ["opd", "lsm"])
def test_replay_of_what_top_p_kept(gloo: GlooPools, inputs: Path, tmp_path: Path, preset: str) -> None:
    """With the same weights the student restricted to the kept ids is the policy that drew; without it is not."""
    (replay,) = gloo(1, steps, inputs, tmp_path / "replay", 1, objective__preset=preset, **KEPT)
    (plain,) = gloo(1, steps, inputs, tmp_path / "plain", 1, objective__preset=preset, **TOP_P)
    for row in (*replay, *plain):
        assert row["logprob_mismatch_max"] < 1e-4 and row["grad_norm"] > 1e-3
    assert replay[0]["reverse_kl"] != pytest.approx(plain[0]["reverse_kl"], rel=1e-2)
    if preset == "opd":
        assert replay[0]["importance"] == pytest.approx(1.0, abs=1e-5)
        assert 0.8 <= plain[0]["importance"] < 0.99, "the mass of what was kept"


@pytest.mark.parametrize(
    "layout",
    [{"tensor": 2}, {"pipeline": 2, "data": 1}, {"context": 2}, {"data": 2}],
    ids=str,
)
def test_every_layout_replays_alike(
    gloo: GlooPools, inputs: Path, tmp_path: Path, layout: dict[str, int]
) -> None:
    """Two updates a step, so that old log-probs are of the kept ids too; the maximum is over all ranks."""
    settings: dict[str, Any] = {
        **KEPT,
        "objective__preset": "exopd",
        "reference__path": inputs / "teacher",
        "training__updates_per_rollout": 2,
    }
    expected = gloo(1, steps, inputs, tmp_path / "one", **settings)[0]
    settings |= {f"parallel__{name}": size for name, size in layout.items()} | {"objective__head_chunk": 5}
    for rows in gloo(2, steps, inputs, tmp_path / "two", **settings):
        assert len({row["logprob_mismatch_max"] for row in rows}) == len(rows)
        for row, want in zip(rows, expected, strict=True):
            assert row == pytest.approx(want, rel=1e-3, abs=1e-4)
