"""Steps of a whole job with every preset, several updates a rollout, masks, and a head that works in chunks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_opd import train as training
from megatron_opd.config.load import load_config
from megatron_opd.config.presets import PRESETS
from megatron_opd.train import train_step
from megatron_opd.training.evaluating import evaluate
from megatron_opd.training.job import Job, set_up
from tests.data.tiny_tokenizer import WORDS, save_tokenizer, write_prompts
from tests.tiny import save_tiny_model

BASE = {
    "precision": "fp32",
    "data.max_prompt_tokens": 32,
    "rollout.prompts_per_step": 4,
    "rollout.max_new_tokens": 8,
    "optimizer.lr": 1e-3,
    "training.steps": 3,
    "training.microbatch_tokens": 64,
}


def save_job_models(folder: Path, **teacher: Any) -> None:
    """A student and a wider, untied teacher, with tokenizers; `teacher` are further settings of `save_tiny_model`."""
    save_tiny_model(folder / "student", seed=1)
    save_tiny_model(folder / "teacher", seed=2, hidden=96, tied=False, **teacher)
    for name in ("student", "teacher"):
        save_tokenizer(folder / name)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Models with tokenizers, and prompts."""
    folder = tmp_path_factory.mktemp("inputs")
    save_job_models(folder, layers=8)
    write_prompts(folder / "prompts.jsonl", 12)
    return folder


def build(inputs: Path, run_dir: Path, **changes: Any) -> Job:
    """The job of a small run; `changes` are dotted keys with `__` for the dot."""
    torch.set_num_threads(1)
    values = BASE | {
        "run_dir": run_dir,
        "student.path": inputs / "student",
        "teacher.path": inputs / "teacher",
        "data.prompts": inputs / "prompts.jsonl",
        "evaluation.prompts": inputs / "prompts.jsonl",
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    empty = run_dir.with_suffix(".yaml")
    empty.write_text("{}\n")
    return set_up(load_config(empty, [f"{key}={value}" for key, value in values.items()]))


def steps(inputs: Path, run_dir: Path, count: int = 2, **changes: Any) -> list[dict[str, float]]:
    job = build(inputs, run_dir, **changes)
    rows = [train_step(job, step)[0] for step in range(1, count + 1)]
    return [{key: value for key, value in row.items() if not key.endswith("_seconds")} for row in rows]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train(gloo, inputs, tmp_path, preset):
    reference = {"reference__path": inputs / "student"} if preset == "exopd" else {}
    rows = gloo(1, steps, inputs, tmp_path / "run", objective__preset=preset, **reference)[0]
    for row in rows:
        assert row["skipped"] == 0 and 1e-4 < row["grad_norm"] < 1e4
        assert row["reverse_kl"] > 0.01, "every objective logs the exact reverse KL"
        assert row["logprob_mismatch"] < 1e-5
    names = set(rows[0])
    sampled = preset in {"opd", "iw-opd", "aopd", "eopd", "exopd", "minillm", "poweropd"}
    assert ("importance" in names) == sampled
    assert ("gated" in names) == (preset in {"aopd", "eopd"})
    assert ("teacher_mass" in names) == (preset in {"lsm", "mopd", "aopd", "eopd"})
    if sampled:
        assert rows[0]["clipped"] == 0.0, "on-policy: the ratio is 1"
        assert rows[0]["importance"] == pytest.approx(1.0, abs=1e-4)


def several_updates(inputs: Path, run_dir: Path) -> dict[str, Any]:
    changes = {"objective__preset": "aopd", "objective__token_weight__kind": "cumulative_share"}
    job = build(inputs, run_dir, training__updates_per_rollout=2, optimizer__lr=0.05, **changes)
    rollouts = job.draw(job.prompts.take(5), step=0, seed=0, samples=1)
    updates = job.score(rollouts)
    job.student.start_step()

    def sums() -> dict[str, float]:
        return job.objective.run(job.student.ddps, updates[1], forward_only=True).sums

    before = sums()
    job.apply(updates[0], 0.0)
    return {
        "tokens": [update.scale.loss_tokens for update in updates],
        "lengths": [len(rollout.response_ids) for rollout in rollouts],
        "before": before,
        "after": sums(),
        "stored": [update.old_logprobs is not None for update in updates],
    }


def test_updates_after_the_first_use_the_stored_log_probabilities(gloo, inputs, tmp_path):
    found = gloo(1, several_updates, inputs, tmp_path / "run")[0]
    assert found["stored"] == [False, True], "before the first update the student is the one that wrote"
    assert found["tokens"] == [sum(found["lengths"][:2]), sum(found["lengths"][2:])]
    before, after = found["before"], found["after"]
    for name in ("log_gap", "abs_log_gap", "weight", "gated", "importance"):
        assert after[name] == pytest.approx(before[name], rel=1e-6), name
    assert before["clipped"] == 0.0 and after["clipped"] > 0.0
    assert abs(after["reverse_kl"] - before["reverse_kl"]) > 1e-3 * before["reverse_kl"], "the student moved"


def test_two_updates_a_step(gloo, inputs, tmp_path):
    rows = gloo(1, steps, inputs, tmp_path / "run", objective__preset="opd", training__updates_per_rollout=2)[
        0
    ]
    alone = gloo(1, steps, inputs, tmp_path / "alone", objective__preset="opd")[0]
    assert rows[0]["tokens"] == alone[0]["tokens"]
    assert [row["lr"] for row in rows] == [row["lr"] for row in alone], "the schedule counts steps"
    assert rows[1]["reverse_kl"] != alone[1]["reverse_kl"]


def test_an_interleaved_pipeline_gives_the_same_steps(gloo, inputs, tmp_path):
    """Drawing, the teacher, the reference, the stored log-probabilities: all go through both chunks of each rank."""
    changes = {
        "objective__preset": "exopd",
        "reference__path": inputs / "student",
        "training__updates_per_rollout": 2,
    }
    expected = gloo(1, steps, inputs, tmp_path / "one", **changes)[0]
    interleaved = {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}
    for rows in gloo(2, steps, inputs, tmp_path / "two", **changes, **interleaved):
        for row, want in zip(rows, expected, strict=True):
            assert row == pytest.approx(want, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("preset", ["iw-opd-exact", "gkd", "aopd"])
def test_a_head_in_chunks_gives_the_same_steps(gloo, inputs, tmp_path, preset):
    whole = gloo(1, steps, inputs, tmp_path / "whole", objective__preset=preset)[0]
    chunked = gloo(1, steps, inputs, tmp_path / "chunked", objective__preset=preset, objective__head_chunk=5)[
        0
    ]
    for row, expected in zip(chunked, whole, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)


def masked_tokens(inputs: Path, run_dir: Path, **changes: Any) -> tuple[int, int, dict[str, Any], bool]:
    job = build(inputs, run_dir, **changes)
    weights = [parameter.detach().clone() for parameter in job.student.chunks[0].parameters()]
    metrics, rollouts, _ = train_step(job, 1)
    same = all(
        torch.equal(old, new) for old, new in zip(weights, job.student.chunks[0].parameters(), strict=True)
    )
    listed = sum(bool(set(rollout.response_ids) & job.texts.mask.token_ids) for rollout in rollouts)
    return sum(len(rollout.response_ids) for rollout in rollouts), listed, metrics, same


def test_masked_tokens_do_not_count(gloo, inputs, tmp_path):
    changes = {"objective__mask__tokens": f"[{WORDS[0]}]", "rollout__prompts_per_step": 8}
    responses, listed, metrics, _ = gloo(1, masked_tokens, inputs, tmp_path / "run", **changes)[0]
    assert listed > 0, "some response holds the token"
    assert metrics["tokens"] == responses - listed


def test_a_step_without_loss_tokens_is_skipped(gloo, inputs, tmp_path):
    changes = {"objective__mask__truncated": "true", "rollout__max_new_tokens": 1}
    _, _, metrics, same = gloo(1, masked_tokens, inputs, tmp_path / "run", **changes)[0]
    assert metrics["truncated"] == 1.0 and metrics["tokens"] == 0
    assert metrics["skipped"] == 1 and "loss" not in metrics and same


def held_out(inputs: Path, run_dir: Path, **changes: Any) -> dict[str, float]:
    return evaluate(build(inputs, run_dir, **changes), 0)


def test_evaluation_is_reverse_kl_whatever_is_trained_on(gloo, inputs, tmp_path):
    values = [
        gloo(1, held_out, inputs, tmp_path / preset, objective__preset=preset)[0]["eval/reverse_kl"]
        for preset in ("iw-opd-exact", "gkd", "aopd")
    ]
    assert values[1:] == pytest.approx(values[:1] * 2, rel=1e-6) and values[0] > 0.01


def published(inputs: Path, run_dir: Path, heldout: bool) -> list[int]:
    """The steps whose weights a run of 2 steps gives its servers."""
    steps: list[int] = []

    @contextmanager
    def serving(job: Job, say: Any) -> Iterator[Any]:
        def publish(step: int) -> float:
            steps.append(step)
            return 0.0

        yield publish

    changes = {} if heldout else {"evaluation__prompts": "null"}
    job = build(inputs, run_dir, training__steps=2, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "serving", serving)
        patch.setattr(dist, "destroy_process_group", lambda: None)
        patch.setattr(training, "set_up", lambda *_: job)
        training.train(job.config)
    return steps


@pytest.mark.parametrize(("heldout", "steps"), [(False, [0, 1]), (True, [0, 1, 2])])
def test_weights_go_out_where_rollouts_follow(gloo, inputs, tmp_path, heldout, steps):
    assert gloo(1, published, inputs, tmp_path / "run", heldout) == [steps]
