"""Whole runs of a student with experts, spread over two processes: learning, logging, resuming, exporting."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

from megatron_opd.config.load import load_config
from megatron_opd.train import train_step
from megatron_opd.training.job import set_up
from tests.checkpoint.models import write_hf
from tests.data.tiny_tokenizer import save_tokenizer, write_prompts
from tests.forked import run_forked
from tests.test_train import metrics, write_config
from tests.tiny import VOCAB, save_tiny_model

SPREAD = {"parallel__data": 2, "parallel__expert": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A student with experts, teachers with and without, and prompts."""
    folder = tmp_path_factory.mktemp("inputs")
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 128}
    write_hf(folder / "student", "qwen3_moe", tied=True, num_hidden_layers=2, **sizes)
    write_hf(folder / "experts", "qwen3_moe", tied=False, norm_topk_prob=False, **sizes)
    save_tiny_model(folder / "dense", seed=2, hidden=96, tied=False)
    for name in ("student", "experts", "dense"):
        save_tokenizer(folder / name)
    for name, rows in (("train", 20), ("heldout", 6)):
        write_prompts(folder / f"{name}.jsonl", rows)
    return folder


def test_a_run_learns_resumes_and_exports(inputs, tmp_path):
    run_dir = tmp_path / "run"
    config = write_config(
        inputs, run_dir, **SPREAD, teacher__path=str(inputs / "dense"), training__moe_aux_loss=0.01
    )
    first = run_forked("launch", "local", config, "training.steps=6")
    assert first.returncode == 0, first.stderr
    assert "Traceback" not in first.stderr
    done = run_forked("launch", "local", config, "training.steps=12")
    assert done.returncode == 0, done.stderr
    assert "resuming at step 6" in done.stdout

    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(13))
    evaluations = [row["eval/reverse_kl"] for row in rows if "eval/reverse_kl" in row]
    assert evaluations[-1] < 0.9 * evaluations[0]
    check(rows[1:])
    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert board.Tags()["scalars"].count("moe/max_load") == 1

    exported = AutoModelForCausalLM.from_pretrained(run_dir / "hf")
    assert isinstance(exported, Qwen3MoeForCausalLM)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "hf")
    prompt = tokenizer("one two three", return_tensors="pt")
    assert torch.isfinite(exported(**prompt).logits).all()


def check(rows: list[dict[str, Any]]) -> None:
    """What every step of a student with 4 experts, 2 a token, logs."""
    for row in rows:
        assert row["skipped"] == 0 and row["logprob_mismatch"] < 1e-5
        assert 1 <= row["moe/max_load"] <= 2
        assert 0.9 < row["moe/load_balancing_loss"] < 4 and 0 < row["moe/router_entropy"] < 1.39


def steps(inputs: Path, run_dir: Path) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    path = write_config(inputs, run_dir, **SPREAD, teacher__path=str(inputs / "experts"))
    job = set_up(load_config(path, []))
    return [train_step(job, step)[0] for step in range(1, 7)]


def test_a_teacher_with_experts_too(gloo, inputs, tmp_path):
    one, other = gloo(2, steps, inputs, tmp_path / "run")
    check(one)
    assert one[-1]["reverse_kl"] < 0.9 * one[0]["reverse_kl"]
    for ours, theirs in zip(one, other, strict=True):
        assert all(ours[key] == theirs[key] for key in ours if not key.endswith("_seconds"))


def coefficient(inputs: Path, run_dir: Path, value: str) -> tuple[float, str]:
    path = write_config(inputs, run_dir, teacher__path=str(inputs / "dense"))
    job = set_up(load_config(path, [f"training.moe_aux_loss={value}"]))
    model = job.student.chunks[0].config
    return model.moe_aux_loss_coeff, model.moe_router_load_balancing_type


def test_the_balancing_loss_is_set_by_the_config_or_the_model(gloo, inputs, tmp_path):
    values = {"null": (0.0, "none"), "0.3": (0.3, "aux_loss"), "0": (0.0, "none")}
    for value, expected in values.items():
        assert gloo(1, coefficient, inputs, tmp_path / value, value) == [expected]
