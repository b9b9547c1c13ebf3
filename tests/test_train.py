"""Whole runs through the command line, as a user starts them: training, resuming after a kill, and mistakes."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_opd.checkpoint.published import published
from megatron_opd.cli import main
from megatron_opd.data.prompts import PromptStream, load_prompts
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.report.ledger import LEDGER_FILE
from megatron_opd.report.step_lines import read_steps
from tests.data.tiny_tokenizer import WORDS, save_tokenizer, write_prompts
from tests.forked import run_forked
from tests.tiny import save_tiny_model

TIMINGS = ("_seconds", "/seconds")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Models with tokenizers, and prompts."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_model(folder / "student", seed=1)
    save_tiny_model(folder / "teacher", seed=2, layers=8, hidden=96, tied=False)
    for name in ("student", "teacher"):
        save_tokenizer(folder / name)
    for name, rows in (("train", 20), ("heldout", 6)):
        write_prompts(folder / f"{name}.jsonl", rows)
    return folder


def write_config(inputs: Path, run_dir: Path, **changes: Any) -> Path:
    """A small run; `changes` are dotted keys with `__` for the dot."""
    config: dict[str, Any] = {
        "run_dir": str(run_dir),
        "precision": "fp32",
        "student": {"path": str(inputs / "student")},
        "teacher": {"path": str(inputs / "teacher")},
        "data": {"prompts": str(inputs / "train.jsonl"), "max_prompt_tokens": 32},
        "rollout": {"prompts_per_step": 4, "max_new_tokens": 8},
        "objective": {"preset": "iw-opd-exact"},
        "optimizer": {"lr": 3e-3},
        "training": {"steps": 6, "microbatch_tokens": 128},
        "evaluation": {"prompts": str(inputs / "heldout.jsonl"), "every": 3},
        "checkpoint": {"save_every": 2},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        config.setdefault(section, {})[name] = value
    path = run_dir.parent / f"{run_dir.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "megatron_opd.cli", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A command as a user starts it; `run_forked` is the same program in a process that is there sooner."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment, timeout=300)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what a clock decides."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith(TIMINGS)} for row in rows]


def check_ledger(inputs: Path, run_dir: Path, *, steps: int, samples: int = 1) -> list[dict[str, Any]]:
    """Every rollout of a run's lineage is in its ledger once, in the order of the prompts; returns the ledger."""
    loaded = load_prompts(
        inputs / "train.jsonl", load_tokenizer(inputs / "student"), max_prompt_tokens=32
    ).prompts
    stream = PromptStream(loaded, seed=0)
    rows = read_steps(run_dir / LEDGER_FILE)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row in rows:
        consumed = [(each["prompt"], each["sample"]) for each in row["rollouts"]]
        assert consumed == [(prompt.id, sample) for prompt in stream.take(4) for sample in range(samples)]
    return rows


def test_a_run_learns_and_leaves_everything_behind(inputs, tmp_path):
    run_dir = tmp_path / "run"
    # A threshold below what rounding does: the alarm of every step.
    alarm = {"rollout__mismatch_threshold": 1e-12}
    config = write_config(inputs, run_dir, training__steps=20, **alarm)
    done = run("train", config)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("rollout and training disagree: log-probs of") == 20

    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(21))
    evaluations = [row["eval/reverse_kl"] for row in rows if "eval/reverse_kl" in row]
    assert len(evaluations) == 1 + 20 // 3 + 1
    assert evaluations[-1] < 0.8 * evaluations[0]
    assert all(row["logprob_mismatch"] < 1e-5 for row in rows[1:]), "rollout and training forward agree"

    names = {path.name for path in run_dir.iterdir()}
    assert names >= {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
        "rollouts",
        "curve.png",
        "report.html",
        "positions.jsonl",
        "hf",
    }
    shown = (run_dir / "report.html").read_text()
    for title in (
        "Held-out reverse KL",
        "Token weight by position",
        "Prefix log-likelihood, step 20",
        "log-gap",
    ):
        assert title in shown
    assert [row["step"] for row in read_steps(run_dir / "positions.jsonl")] == list(range(1, 21))
    exported = AutoModelForCausalLM.from_pretrained(run_dir / "hf")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "hf")
    prompt = tokenizer("one two three", return_tensors="pt")
    assert exported.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt.input_ids.shape[1]

    again = run_forked("train", config)  # finished: nothing is trained, and nothing is lost
    assert again.returncode == 0, again.stderr
    assert metrics(run_dir) == rows


def test_the_exported_student_is_the_checkpoint(inputs, tmp_path):
    run_dir = tmp_path / "run"
    assert run_forked("train", write_config(inputs, run_dir)).returncode == 0
    converted = run_forked(
        "convert", "megatron-to-hf", run_dir / "checkpoints" / "latest", tmp_path / "converted"
    )
    assert converted.returncode == 0, converted.stderr
    exported, checkpoint = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (run_dir / "hf", tmp_path / "converted")
    )
    assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in exported.items())


def test_an_interleaved_pipeline_trains_alike_and_goes_on_in_another_layout(inputs, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    settings = {"evaluation__every": 2}
    assert run_forked("train", write_config(inputs, one, **settings)).returncode == 0
    config = write_config(inputs, other, **settings)
    interleaved = ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "training.steps=4")
    for changes in (interleaved, ("parallel.tensor=2",)):
        done = run_forked("launch", "local", config, *changes)
        assert done.returncode == 0, done.stderr
    assert "resuming at step 4" in done.stdout
    for row, expected in zip(metrics(other), metrics(one), strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)
    exported, expected = (load_file(run_dir / "hf" / "model.safetensors") for run_dir in (other, one))
    assert all(torch.allclose(exported[name], tensor, atol=1e-4) for name, tensor in expected.items())


def kill_rank(launcher: subprocess.Popen[str], rank: int) -> None:
    for child in psutil.Process(launcher.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank) and "megatron_opd.cli" in " ".join(child.cmdline()):
            os.kill(child.pid, signal.SIGKILL)
            return
    raise AssertionError(f"no process of rank {rank}")


def test_killed_and_started_again_it_continues_bit_for_bit(inputs, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {"parallel__data": 2, "training__steps": 40, "checkpoint__save_every": 3}
    assert run_forked("launch", "local", write_config(inputs, whole, **settings)).returncode == 0

    config = write_config(inputs, killed, **settings)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(
        command("launch", "local", config), stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 120
    while not (published(killed / "checkpoints") and metrics(killed)[-1]["step"] > 3):  # past the first save
        assert time.monotonic() < deadline and launcher.poll() is None, "no save to kill after"
        time.sleep(0.01)
    kill_rank(launcher, 1)
    message = launcher.communicate(timeout=120)[1]
    assert launcher.returncode == 1
    assert "killed by SIGKILL" in message and "resume" in message
    assert metrics(killed)[-1]["step"] < 40

    again = run_forked("launch", "local", config)
    assert again.returncode == 0, again.stderr
    assert "resuming at step" in again.stdout
    assert metrics(killed) == metrics(whole)
    assert read_steps(killed / "positions.jsonl") == read_steps(whole / "positions.jsonl")
    for row in check_ledger(inputs, killed, steps=40):
        assert all(each["versions"] == [row["step"] - 1] for each in row["rollouts"])


def test_more_processes_go_on_with_the_prompts_that_are_due(inputs, tmp_path):
    """Another world size: as many prompts a step as before, none lost and none drawn twice."""
    config = write_config(inputs, tmp_path / "run", checkpoint__save_every=1, evaluation__every=1)
    waiting = run_forked("train", config, "training.steps=3", "checkpoint.asynchronous=false")
    assert "saved 3 checkpoints: the training waited" in waiting.stdout, waiting.stderr
    done = run_forked("launch", "local", config, "parallel.data=2")
    assert done.returncode == 0, done.stderr
    assert "resuming at step 3: TP1·PP1·CP1·DP2" in done.stdout
    check_ledger(inputs, tmp_path / "run", steps=6)
    rows = read_steps(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(7))
    saved = [row["save_seconds"] for row in rows[1:]]  # in the row after the step that was saved
    assert saved[0] == saved[3] == 0 and min(saved[1:3] + saved[4:]) > 0


def test_sequences_shared_by_two_processes_give_the_same_run(inputs, tmp_path):
    """Context parallelism, five prompts over two processes, sampled log-probs kept for a second update."""
    rows, settings = [], {"rollout__prompts_per_step": 5, "training__updates_per_rollout": 2}
    for command, context in (("train",), 1), (("launch", "local"), 2):
        config = write_config(
            inputs, tmp_path / f"context-{context}", parallel__context=context, training__steps=3, **settings
        )
        done = run_forked(*command, config)
        assert done.returncode == 0, done.stderr
        rows.append(metrics(tmp_path / f"context-{context}"))
    assert len(rows[0]) == len(rows[1]) == 4
    for whole, shared in zip(*rows, strict=True):
        assert shared == pytest.approx(whole, rel=1e-5, abs=1e-6)
    exported = [load_file(tmp_path / f"context-{n}" / "hf" / "model.safetensors") for n in (1, 2)]
    for name, whole in exported[
        0
    ].items():  # the mean: Adam makes a step of whatever rounding leaves of a zero gradient
        assert (exported[1][name] - whole).abs().mean() < 1e-5, name


def broken_line(inputs: Path, folder: Path) -> dict[str, Any]:
    path = folder / "broken.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": "tw\n')
    return {"data__prompts": str(path)}


def other_tokenizer(inputs: Path, folder: Path) -> dict[str, Any]:
    save_tiny_model(folder / "other")
    save_tokenizer(folder / "other", words=(*WORDS[:-1], "verbose"))
    return {"teacher__path": str(folder / "other")}


def test_a_run_directory_in_use_is_refused(inputs, tmp_path, capfd):
    run_dir = tmp_path / "run"
    config = write_config(inputs, run_dir)
    run_dir.mkdir()
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as ended:
            main(["train", str(config)])
    assert ended.value.code == 2
    assert "is in use by another process" in capfd.readouterr().err


def test_what_changed_since_the_last_start_is_said(inputs, tmp_path):
    run_dir = tmp_path / "run"
    assert run_forked("train", write_config(inputs, run_dir)).returncode == 0
    again = run_forked("train", write_config(inputs, run_dir, training__steps=7), "optimizer.lr=1e-4")
    assert again.returncode == 0, again.stderr
    assert "changed from step 6 on: optimizer.lr: 0.003 -> 0.0001" in again.stdout
    assert metrics(run_dir)[-1]["lr"] == 1e-4
    finished = run_forked("train", write_config(inputs, run_dir, training__steps=7), "optimizer.lr=1e-4")
    assert "finished already (7 steps; raise training.steps to go on)" in finished.stdout


MISTAKES: dict[str, tuple[Callable[[Path, Path], dict[str, Any]], str]] = {
    "misspelt key": (lambda *_: {"optimizer__learning_rate": 1e-3}, "optimizer.learning_rate"),
    "missing model": (lambda *_: {"student__path": "/nowhere"}, "/nowhere"),
    "TP does not divide": (lambda *_: {"parallel__tensor": 3}, "parallel.tensor: 3 does not divide"),
    "other tokenizer": (other_tokenizer, "different tokenizers"),
    "broken prompt line": (broken_line, "broken.jsonl, line 2"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(inputs, tmp_path, capfd, mistake):
    changes, words = MISTAKES[mistake]
    config = write_config(inputs, tmp_path / "run", **changes(inputs, tmp_path))
    capfd.readouterr()  # what making the inputs printed
    with pytest.raises(SystemExit) as ended:
        main([*("launch local" if mistake == "TP does not divide" else "train").split(), str(config)])
    assert ended.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], lines
    assert not (tmp_path / "run").exists()


def test_a_mistake_that_only_the_ranks_find_is_one_line_too(inputs, tmp_path):
    config = write_config(inputs, tmp_path / "run", **broken_line(inputs, tmp_path), parallel__data=2)
    done = run("launch", "local", config)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "broken.jsonl, line 2" in lines[0], lines


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB. Needs the right to mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_at_save_loses_nothing(inputs, tmp_path, small_disk):
    """The first checkpoint fits, the second does not while the first is kept."""
    config = write_config(inputs, small_disk / "run", checkpoint__save_every=2)
    done = run_forked("train", config)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: cannot save a checkpoint")
    assert "no space left on device" in done.stderr and "Traceback" not in done.stderr
    kept = published(small_disk / "run" / "checkpoints")
    assert [path.name for path in kept] == ["step_00000002"]

    shutil.move(small_disk / "run" / "checkpoints", tmp_path / "moved")  # the user makes room
    (small_disk / "run" / "checkpoints").symlink_to(tmp_path / "moved")
    again = run_forked("train", config)
    assert again.returncode == 0, again.stderr
    assert "resuming at step 2" in again.stdout
    assert [row["step"] for row in metrics(small_disk / "run")] == list(range(7))


def test_a_run_without_any_loss_token_says_so_and_ends_well(inputs, tmp_path):
    masked = {"truncated": True}
    config = write_config(inputs, tmp_path / "run", objective__mask=masked, rollout__max_new_tokens=1)
    done = run_forked("train", config, "evaluation.prompts=null", "evaluation.every=0", "training.steps=2")
    assert done.returncode == 0, done.stderr
    assert "no step had a token that enters the loss" in done.stdout + done.stderr
    assert [row["skipped"] for row in metrics(tmp_path / "run")] == [1, 1]


def broken_teacher(inputs: Path, folder: Path) -> None:
    """The teacher with a weight that is not a number."""
    shutil.copytree(inputs / "teacher", folder)
    weights = next(folder.glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})


def test_check_names_the_model_that_is_not_finite(inputs, tmp_path):
    broken_teacher(inputs, tmp_path / "teacher")
    config = write_config(inputs, tmp_path / "run")
    settings = ("objective.check=true", "evaluation.prompts=null", "evaluation.every=0")
    done = run_forked("train", config, f"teacher.path={tmp_path / 'teacher'}", *settings)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: objective.check: teacher logits hold NaN or inf" in done.stderr
