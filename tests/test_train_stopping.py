"""Runs that a signal stops: they save, end with the requeue code, and go on as if nothing had been."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from megatron_opd.checkpoint.store import published
from megatron_opd.launch.worker import REQUEUE_EXIT
from tests.forked import run_forked
from tests.slurm_cluster import until
from tests.test_train import check_ledger, command, inputs, metrics, write_config

__all__ = ["inputs"]

STOPPED = re.compile(r"stopped by (\w+) after step (\d+): saved; the same command resumes")


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A command as a user starts it; at the end it is killed if it still runs, and its ranks with it."""
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()


def saves_at_a_signal(process: psutil.Process) -> bool:
    """Whether a rank is in its steps: before, it has no handler of SIGTERM."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def rank(launcher: subprocess.Popen[str], number: int) -> psutil.Process:
    """The process of a rank."""
    children = psutil.Process(launcher.pid).children()
    return next(child for child in children if child.environ().get("RANK") == str(number))


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while not (run_dir / "metrics.jsonl").exists() or step not in [row["step"] for row in metrics(run_dir)]:
        assert time.monotonic() < deadline and process.poll() is None, "it did not get that far"
        time.sleep(0.01)


def stopped_at(process: subprocess.Popen[str], run_dir: Path, signal_name: str) -> int:
    """The step that a run says it has been stopped after, which is what it has saved and logged."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == REQUEUE_EXIT, err
    assert "Traceback" not in err
    (found,) = STOPPED.findall(out)
    assert found[0] == signal_name
    step = int(found[1])
    assert published(run_dir / "checkpoints")[-1].name == f"step_{step:08d}"
    assert metrics(run_dir)[-1]["step"] == step
    return step


@pytest.mark.parametrize(
    ("layout", "told", "number"),
    [
        ({"parallel__data": 2}, 1, signal.SIGUSR1),
        ({"teacher__parallel": {"separate": True}}, 1, signal.SIGINT),  # a rank of the teacher
        pytest.param({"parallel__pipeline": 2}, 0, signal.SIGUSR1, marks=pytest.mark.full),
    ],
)
def test_a_signal_to_one_rank_stops_all_and_nothing_is_lost(
    inputs: Path, tmp_path: Path, layout: dict[str, Any], told: int, number: signal.Signals
) -> None:
    """Ctrl-C leaves a report too. A scheduler, which sends the other signal, is not kept waiting for it."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = {"training__steps": 40, "checkpoint__save_every": 0, **layout}
    config = write_config(inputs, cut, **settings)
    with started("launch", "local", config) as launcher:
        wait_for_step(launcher, cut, 2)
        rank(launcher, told).send_signal(number)
        step = stopped_at(launcher, cut, number.name)
    assert 2 <= step < 40
    assert (cut / "report.html").exists() == (number == signal.SIGINT)

    assert run_forked("launch", "local", write_config(inputs, whole, **settings)).returncode == 0
    again = run_forked("launch", "local", config)
    assert again.returncode == 0, again.stderr
    assert f"resuming at step {step}" in again.stdout
    drop = ("teacher_wait_seconds",)
    rows = [
        [{k: v for k, v in row.items() if k not in drop} for row in metrics(each)] for each in (cut, whole)
    ]
    assert rows[0] == rows[1]
    check_ledger(inputs, cut, steps=40)
    exported = [load_file(each / "hf" / "model.safetensors") for each in (cut, whole)]
    assert all(torch.equal(tensor, exported[1][name]) for name, tensor in exported[0].items())


def test_a_long_rollout_is_cut_off(inputs: Path, tmp_path: Path) -> None:
    """The launcher passes the signal on; thousands of responses, one by one, are not waited for."""
    run_dir = tmp_path / "run"
    config = write_config(inputs, run_dir, parallel__data=2, training__steps=1, evaluation__every=0)
    assert run_forked("launch", "local", config).returncode == 0
    endless = ("training.steps=3", "rollout.samples_per_prompt=50000", "rollout.max_batch=1")
    with started("launch", "local", config, *endless) as launcher:
        deadline = time.monotonic() + 120
        while len(psutil.Process(launcher.pid).children()) < 2 or not all(
            saves_at_a_signal(rank(launcher, number)) for number in (0, 1)
        ):
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.05)
        launcher.send_signal(signal.SIGTERM)
        assert stopped_at(launcher, run_dir, "SIGTERM") == 1


def test_ctrl_c_once_more_ends_a_run_at_once(inputs: Path, tmp_path: Path) -> None:
    """While thousands of responses to a task are drawn, which are finished otherwise."""
    run_dir = tmp_path / "run"
    config = write_config(inputs, run_dir, evaluation__prompts=None, evaluation__every=0, training__steps=1)
    assert run_forked("train", config).returncode == 0
    problem = json.dumps({"question": "one two", "answer": "1"}) + "\n"
    words = ["training.steps=5000", "evaluation.every=1", "rollout.max_batch=1"]
    for name, count in (("few", 1), ("many", 5_000)):
        (tmp_path / f"{name}.jsonl").write_text(problem * count)
        words.append(f"evaluation.tasks.{name}.path={tmp_path / name}.jsonl")
    with started("train", config, *words) as process:
        few = run_dir / "evaluation" / "step_00000002" / "few.jsonl"
        until(lambda: few.exists() or process.poll() is not None, lambda: "no step was evaluated", 200)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while "SIGINT: stopping" not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(1.5)  # within a second it would count as the same
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=200)[1]
    assert process.returncode == 130 and "Traceback" not in err and "ended at once" in err, err


def test_a_rank_that_hangs_ends_the_run_in_time(inputs: Path, tmp_path: Path) -> None:
    """Stopped, it cannot even say so; the other one does, with its own stacks."""
    run_dir = tmp_path / "run"
    short = {"rollout": 15.0, "teacher": 15.0, "step": 15.0, "sync": 15.0, "evaluation": 15.0, "save": 15.0}
    config = write_config(
        inputs, run_dir, training__steps=5000, checkpoint__save_every=0, parallel__data=2, evaluation__every=0
    )
    limits = [f"timeouts.{phase}={seconds}" for phase, seconds in short.items()]
    with started("launch", "local", config, *limits) as launcher:
        wait_for_step(launcher, run_dir, 2)
        rank(launcher, 1).send_signal(signal.SIGSTOP)
        _, err = launcher.communicate(timeout=400)
    assert launcher.returncode == 1
    line = err.splitlines()[-1]
    assert re.match(
        r"error: rank 0 has been in (rollout|step) for \d+ s \(section timeouts: at most 15\)", line
    ), err
    assert re.search(r"rank 1 is silent for \d+ s, last in \w+", line)
    stacks = (run_dir / "stacks" / "rank_00000.txt").read_text()
    assert "train.py" in stacks and "watchdog" in stacks
