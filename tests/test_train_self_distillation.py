"""A whole run from its command line: the student learns from its own average, which reads the solutions."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_opd.checkpoint.published import published
from tests.data.tiny_tokenizer import save_tokenizer
from tests.test_train import metrics
from tests.tiny import save_tiny_model
from tests.training.test_teacher_prompts import write_solved_prompts


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_model(folder / "student", seed=1)
    save_tokenizer(folder / "student")
    write_solved_prompts(folder / "train.jsonl", 12)
    write_solved_prompts(folder / "heldout.jsonl", 5)
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_opd.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def write_config(inputs: Path, run_dir: Path) -> Path:
    config: dict[str, Any] = {
        "run_dir": str(run_dir),
        "precision": "bf16",
        "student": {"path": str(inputs / "student")},
        "teacher": {
            "path": str(inputs / "student"),
            "prompt_template": "{prompt} be brief {solution}",
            "max_prompt_tokens": 17,
            "ema": 0.5,
        },
        "data": {"prompts": str(inputs / "train.jsonl"), "max_prompt_tokens": 16},
        "rollout": {"prompts_per_step": 4, "max_new_tokens": 8},
        "optimizer": {"lr": 3e-3},
        "training": {"steps": 10, "microbatch_tokens": 96},
        "evaluation": {"prompts": str(inputs / "heldout.jsonl")},
        "checkpoint": {"save_every": 5},
    }
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_run_learns_is_stopped_and_goes_on(inputs: Path, tmp_path: Path) -> None:
    config = write_config(inputs, tmp_path / "run")
    first = run("train", config, "training.steps=5", "checkpoint.export_hf=false")
    assert first.returncode == 0, first.stderr
    assert "prompts dropped, as the teacher's are longer" in first.stdout
    again = run("launch", "local", config, "parallel.tensor=2")
    assert again.returncode == 0, again.stderr
    assert "resuming at step 5" in again.stdout
    rows = metrics(tmp_path / "run")
    evaluations = [row["eval/reverse_kl"] for row in rows if "eval/reverse_kl" in row]
    assert [row["step"] for row in rows] == list(range(11))
    assert len(evaluations) == 3 and evaluations[-1] < 0.9 * evaluations[0]

    folder = published(tmp_path / "run" / "checkpoints")[-1]
    report = run("convert", "inspect", folder)
    assert report.returncode == 0 and "\nteacher " in report.stdout, report.stdout + report.stderr
    converted = run("convert", "megatron-to-hf", folder, tmp_path / "hf")
    assert converted.returncode == 0, converted.stderr
    ours, theirs = (next(path.glob("*.safetensors")) for path in (tmp_path / "hf", tmp_path / "run" / "hf"))
    assert ours.read_bytes() == theirs.read_bytes(), "the student's weights, not the teacher's"

    other = run("train", config, "training.steps=11", "teacher.prompt_template='{solution} {prompt}'")
    assert other.returncode == 2 and len(other.stderr.splitlines()) == 1
    assert "data.prompts (SHA-256 of their tokens)" in other.stderr and "the teacher's" in other.stderr


def test_a_line_without_the_field_is_one_line_and_exit_code_2(inputs: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "one", "solution": "two"}\n{"prompt": "three"}\n')
    done = run("train", write_config(inputs, tmp_path / "run"), f"evaluation.prompts={broken}")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "broken.jsonl, line 2: field 'solution' is missing; teacher.prompt_template" in line
