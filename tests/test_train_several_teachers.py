"""Whole runs with several teachers, as a user starts them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.data.tiny_tokenizer import make_tokenizer
from tests.forked import run_forked
from tests.test_train import inputs, metrics, write_config
from tests.tiny import save_tiny_model

__all__ = ["inputs"]


def route(source: Path, target: Path, names: str) -> Path:
    """The prompts with a domain each, in turn."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    lines = [json.dumps({**row, "domain": names[i % len(names)]}) for i, row in enumerate(rows)]
    target.write_text("\n".join(lines) + "\n")
    return target


@pytest.fixture
def settings(inputs: Path, tmp_path: Path) -> dict[str, Any]:
    """Two teachers, routed: of three prompts one is for the second."""
    second = tmp_path / "second"
    save_tiny_model(second, seed=5)
    make_tokenizer().save_pretrained(second)
    return {
        "teacher__path": None,
        "teacher__paths": {"a": str(inputs / "teacher"), "b": str(second)},
        "teacher__route_field": "domain",
        "data__prompts": str(route(inputs / "train.jsonl", tmp_path / "train.jsonl", "aab")),
        "evaluation__prompts": str(route(inputs / "heldout.jsonl", tmp_path / "heldout.jsonl", "ab")),
    }


def test_a_routed_run_stopped_and_resumed(inputs: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    run_dir = tmp_path / "run"
    whole = run_forked("train", write_config(inputs, tmp_path / "whole", **settings))
    assert whole.returncode == 0, whole.stderr
    assert "teachers: a, b, one a prompt" in whole.stdout
    config = write_config(inputs, run_dir, **settings)
    stopped = run_forked("train", config, "training.steps=4")
    assert stopped.returncode == 0, stopped.stderr
    other = tmp_path / "other.jsonl"
    other.write_text(Path(settings["data__prompts"]).read_text().replace('"domain": "a"', '"domain": "b"', 1))
    (refusal,) = run_forked("train", config, f"data.prompts={other}").stderr.splitlines()
    assert "belongs to a run with teacher.route_field (SHA-256 of the prompts' teachers) = " in refusal
    resumed = run_forked("train", config)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step 4" in resumed.stdout
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(7))
    for row, expected in zip(rows, metrics(tmp_path / "whole"), strict=True):
        if row["step"] != 4:  # held-out prompts were also drawn for after the last step of the first part
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for row in rows[1:]:
        parts = [(row[f"teacher/{name}/tokens"], row.get(f"teacher/{name}/reverse_kl", 0.0)) for name in "ab"]
        assert sum(tokens for tokens, _ in parts) == row["tokens"]
        mean = sum(tokens * distance for tokens, distance in parts) / row["tokens"]
        assert row["reverse_kl"] == pytest.approx(mean, rel=1e-6)
    last = rows[-1]
    tokens = {name: last[f"eval/teacher/{name}/tokens"] for name in "ab"}
    mean = sum(tokens[name] * last[f"eval/teacher/{name}/reverse_kl"] for name in "ab") / sum(tokens.values())
    assert last["eval/reverse_kl"] == pytest.approx(mean, rel=1e-6)
    line = json.loads(next((run_dir / "rollouts").glob("*.jsonl")).read_text().splitlines()[0])
    assert line["route"] in ("a", "b")


def test_a_mixed_run_in_another_layout(inputs: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """One process with the student's layout written out as the teachers' own."""
    mixed = settings | {
        "teacher__route_field": None,
        "teacher__weights": {"a": 1, "b": 3},
        "teacher__parallel": {"tensor": 1},
    }
    config = write_config(
        inputs, tmp_path / "run", **mixed, training__steps=2, training__updates_per_rollout=2
    )
    done = run_forked("train", config)
    assert done.returncode == 0, done.stderr
    assert "teachers: a 0.25, b 0.75: TP1" in done.stdout
    for row in metrics(tmp_path / "run")[1:]:
        assert row["teacher/a/tokens"] == row["teacher/b/tokens"] == row["tokens"]
        mean = 0.25 * row["teacher/a/reverse_kl"] + 0.75 * row["teacher/b/reverse_kl"]
        assert row["reverse_kl"] == pytest.approx(mean, rel=1e-5)


def heldout_without(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "bare.jsonl"
    path.write_text('{"prompt": "one", "domain": "a"}\n{"prompt": "two"}\n')
    return {"evaluation__prompts": str(path)}


def other_tokenizer(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    folder = tmp_path / "other"
    shutil.copytree(settings["teacher__paths"]["b"], folder)
    make_tokenizer(words=("one",)).save_pretrained(folder)
    return {"teacher__paths": settings["teacher__paths"] | {"b": str(folder)}}


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (heldout_without, r"bare.jsonl, line 2: no field 'domain'"),
        (other_tokenizer, r"student.path and teacher.paths.b have different tokenizers"),
    ],
)
def test_a_mistake_names_the_teacher_or_the_line(
    inputs: Path, tmp_path: Path, settings: dict[str, Any], mistake: Any, words: str
) -> None:
    config = write_config(inputs, tmp_path / "run", **settings | mistake(settings, tmp_path))
    done = run_forked("train", config)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert words in done.stderr
