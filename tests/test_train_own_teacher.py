"""Whole runs with a teacher in a layout of its own, as a user starts them: the metrics are those of one process."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.checkpoint.convert import hf_to_megatron
from megatron_opd.checkpoint.published import published
from tests.test_train import (
    broken_line,
    broken_teacher,
    command,
    inputs,
    kill_rank,
    metrics,
    run,
    write_config,
)

__all__ = ["inputs"]

STEPS = 24
SETTINGS: dict[str, Any] = {
    "training__steps": STEPS,
    "training__updates_per_rollout": 2,
    "evaluation__every": 5,
    "checkpoint__save_every": 3,
}


@pytest.fixture(scope="module")
def one_process(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of the run with both models in one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    done = run("train", write_config(inputs, folder, **SETTINGS))
    assert done.returncode == 0, done.stderr
    return metrics(folder)


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """As close as sums in another order stay over the steps of a run."""
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, want in zip(found, expected, strict=True):
        assert row == pytest.approx(want, rel=1e-3, abs=1e-4)


@pytest.mark.full
def test_another_layout_on_the_same_processes(
    inputs: Path, tmp_path: Path, one_process: list[dict[str, Any]]
) -> None:
    own = {"parallel__data": 2, "teacher__parallel": {"pipeline": 2}}
    done = run("launch", "local", write_config(inputs, tmp_path / "run", **SETTINGS, **own))
    assert done.returncode == 0, done.stderr
    assert_same(metrics(tmp_path / "run"), one_process)


def test_a_separate_teacher_killed_in_a_step_and_started_again(
    inputs: Path, tmp_path: Path, one_process: list[dict[str, Any]]
) -> None:
    """Held-out evaluations and checkpoints go on beside it; models in Megatron's format, which all processes load."""
    run_dir = tmp_path / "run"
    changes: dict[str, Any] = {"teacher__parallel": {"separate": True, "pipeline": 2}}
    for name in ("student", "teacher"):
        hf_to_megatron(inputs / name, tmp_path / name)
        changes[f"{name}__path"] = str(tmp_path / name)
    config = write_config(inputs, run_dir, **SETTINGS, **changes)
    launcher = subprocess.Popen(
        command("launch", "local", config),
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (published(run_dir / "checkpoints") and metrics(run_dir)[-1]["step"] > 3):
        assert time.monotonic() < deadline and launcher.poll() is None, "no save to kill after"
        time.sleep(0.01)
    kill_rank(launcher, 2)
    message = launcher.communicate(timeout=120)[1]
    assert launcher.returncode == 1 and "rank 2 was killed by SIGKILL" in message
    assert metrics(run_dir)[-1]["step"] < STEPS
    again = run("launch", "local", config)
    assert again.returncode == 0, again.stderr
    assert "resuming at step" in again.stdout
    assert "PP2·CP1·DP1 on processes 1 to 2" in again.stdout and "WARNING" not in again.stderr
    assert_same(metrics(run_dir), one_process)
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["teacher_wait_seconds"] >= 0 for row in steps if row["step"] > 0)
    finished = run("launch", "local", config)
    assert finished.returncode == 0 and "finished already" in finished.stdout, finished.stderr


@pytest.mark.full
def test_a_mistake_of_the_students_side_ends_the_teachers(inputs: Path, tmp_path: Path) -> None:
    own = {"teacher__parallel": {"separate": True}}
    config = write_config(inputs, tmp_path / "run", **own, **broken_line(inputs, tmp_path))
    done = run("launch", "local", config)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and "broken.jsonl, line 2" in lines[0], lines


def test_an_error_of_the_students_side_in_a_step_ends_the_teachers(inputs: Path, tmp_path: Path) -> None:
    """The student's rank finds that what the teacher sends is not finite."""
    broken_teacher(inputs, tmp_path / "teacher")
    own = {"teacher__parallel": {"separate": True}, "teacher__path": str(tmp_path / "teacher")}
    quiet = ("objective.check=true", "evaluation.prompts=null", "evaluation.every=0")
    done = run("launch", "local", write_config(inputs, tmp_path / "run", **own), *quiet)
    assert done.returncode == 2, done.stderr
    assert "error: objective.check: teacher logits hold NaN or inf" in done.stderr
