"""A teacher that follows the student: its weights by the formula, in layouts and precisions, saved and resumed."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_opd.checkpoint.hf_export import export_hf_tensors
from megatron_opd.checkpoint.inspection import describe_folder
from megatron_opd.errors import UserError
from megatron_opd.models.gpt import GPT
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.train import train_step
from megatron_opd.training.evaluating import evaluate
from megatron_opd.training.job import Job
from megatron_opd.training.saving import Saves, resume
from tests.checkpoint.models import write_hf
from tests.data.tiny_tokenizer import save_tokenizer, write_prompts
from tests.gloo_pool import GlooPools
from tests.tiny import VOCAB, save_tiny_model
from tests.training.test_job import build

DECAY = 0.75
EMA = {"teacher__ema": DECAY, "optimizer__lr": 0.01}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher begins with other weights than the student."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_model(folder / "student", seed=1)
    save_tiny_model(folder / "teacher", seed=2)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 128}
    write_hf(folder / "experts", "qwen3_moe", tied=False, num_hidden_layers=2, **sizes)
    shutil.copytree(folder / "experts", folder / "experts teacher")
    (weights,) = (folder / "experts teacher").glob("*.safetensors")
    generator = torch.Generator().manual_seed(0)
    others = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(weights).items()
    }
    save_file(others, weights, metadata={"format": "pt"})
    for name in ("student", "teacher", "experts", "experts teacher"):
        save_tokenizer(folder / name)
    write_prompts(folder / "prompts.jsonl", 12)
    return folder


def exported(job: Job, chunks: Sequence[GPT]) -> dict[str, Tensor]:
    """Float64, by Hugging Face name, assembled from all shards."""
    tensors = export_hf_tensors(chunks, job.architecture, job.groups)
    return {name: tensor.double() for name, tensor in tensors}


def student_of(job: Job) -> dict[str, Tensor]:
    """The student's float32 weights; rounded they are those that it runs with."""
    parameters = [parameter for chunk in job.student.chunks for parameter in chunk.parameters()]
    values = [parameter.data for parameter in parameters]
    for parameter, main in zip(parameters, list(job.student.main_weights()), strict=True):
        assert main.dtype == torch.float32
        assert torch.equal(main.to(parameter.dtype), parameter.data)
        parameter.data = main.clone()
    found = exported(job, job.student.chunks)
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value
    return found


def follow(inputs: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Two steps of two updates. Every weight of the student after each, and of the average; the teacher's."""
    job = build(inputs, run_dir, training__updates_per_rollout=2, **EMA, **changes)
    assert job.average is not None and isinstance(job.teacher, MegatronTeacher)
    found: dict[str, Any] = {"teacher": [exported(job, job.teacher.chunks)], "student": []}
    for step in (1, 2):
        updates = job.score(job.rollouts.take(step))
        job.student.start_step()
        for update in updates:
            assert job.apply(update, 0.0).applied
            found["student"].append(student_of(job))
        found["teacher"].append(exported(job, job.teacher.chunks))
        job.average.hand_over()
    found["teacher"].append(exported(job, job.teacher.chunks))
    with job.average.as_model() as chunks:
        found["average"] = exported(job, chunks)
    return found


MOE = {"student__path": "experts", "teacher__path": "experts teacher"}


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {}),
        (2, {"parallel__tensor": 2}),
        (2, {"precision": "bf16"}),
        (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "precision": "bf16"}),
        (2, {"precision": "bf16", "optimizer__distributed": False}),
        (2, {"precision": "bf16", "parallel__expert": 2, **MOE}),
    ],
    ids=["one", "TP2", "DP2-bf16", "PP2-VPP2-bf16", "DP2-bf16-unsharded", "EP2-bf16"],
)
def test_the_average_is_what_the_formula_says(
    gloo: GlooPools, inputs: Path, tmp_path: Path, world_size: int, changes: dict[str, Any]
) -> None:
    changes = {k: inputs / v if k.endswith("path") else v for k, v in changes.items()}
    for found in gloo(world_size, follow, inputs, tmp_path / "run", **changes):
        start, unmoved, before, end = found["teacher"]
        assert len(found["student"]) == 4
        for name, weight in found["average"].items():
            want = start[name]
            for update, student in enumerate(found["student"]):
                if update == 2:  # the teacher takes it over at the end of a step
                    assert (before[name] - want).abs().max() <= want.abs().max() * 2**-8, name
                want = DECAY * want + (1 - DECAY) * student[name]
            assert torch.equal(unmoved[name], start[name])
            assert (weight - want).abs().max() < 1e-6 * want.abs().max(), name
            rounded = torch.bfloat16 if "precision" in changes else torch.float32
            assert torch.equal(end[name], weight.to(rounded).double()), name
            assert (want - start[name]).abs().max() > 1e-3, name


def test_skipped_updates_leave_it(gloo: GlooPools, inputs: Path, tmp_path: Path) -> None:
    assert gloo(1, skip, inputs, tmp_path / "run")[0]


def skip(inputs: Path, run_dir: Path) -> bool:
    job = build(inputs, run_dir, **EMA)
    assert job.average is not None
    with job.average.as_model() as chunks:
        before = exported(job, chunks)
    (update,) = job.score(job.rollouts.take(1))
    job.student.zero_grad()
    first = next(job.student.chunks[0].parameters())
    first.data[0] = torch.nan
    assert not job.apply(update, 0.0).applied
    with job.average.as_model() as chunks:
        return all(torch.equal(before[name], weight) for name, weight in exported(job, chunks).items())


def row(job: Job, step: int) -> dict[str, float]:
    metrics = train_step(job, step)[0] | evaluate(job, step)
    return {key: value for key, value in metrics.items() if not key.endswith("seconds")}


def whole(inputs: Path, run_dir: Path, **changes: Any) -> list[dict[str, float]]:
    job = build(inputs, run_dir, training__steps=4, **EMA, **changes)
    saves, rows = Saves(job), []
    for step in range(1, 5):
        rows.append(row(job, step))
        if step == 2:
            saves.begin(step)
    saves.finish()
    return rows


def resumed(inputs: Path, run_dir: Path, **changes: Any) -> list[dict[str, float]]:
    job = build(inputs, run_dir, training__steps=4, **(EMA | changes))
    assert resume(job) == 2
    return [row(job, step) for step in (3, 4)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_goes_on_bit_for_bit_and_in_another_layout(
    gloo: GlooPools, inputs: Path, tmp_path: Path, precision: str
) -> None:
    expected = gloo(2, whole, inputs, tmp_path / "whole", precision=precision)[0]
    for name in ("again", "other"):
        shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / name / "checkpoints")
    assert gloo(2, resumed, inputs, tmp_path / "again", precision=precision)[0] == expected[2:]
    layout = {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}
    rows = gloo(2, resumed, inputs, tmp_path / "other", precision=precision, **layout)[0]
    assert rows[0]["tokens"] == expected[2]["tokens"]
    tolerance = 1e-4 if precision == "fp32" else 5e-2
    assert rows[0]["reverse_kl"] == pytest.approx(expected[2]["reverse_kl"], rel=tolerance)


def test_a_checkpoint_says_whether_it_has_a_teacher(gloo: GlooPools, inputs: Path, tmp_path: Path) -> None:
    gloo(1, whole, inputs, tmp_path / "whole")
    (folder,) = (tmp_path / "whole" / "checkpoints").glob("step_*")
    assert json.loads((folder / "run.json").read_text())["teacher"] is True
    report = describe_folder(folder)
    assert "\nteacher " in report
    with pytest.raises(UserError, match=r"teacher\.ema: .* saved with a teacher .* set it to the decay"):
        shutil.copytree(folder.parent, tmp_path / "without" / "checkpoints")
        gloo(1, resumed, inputs, tmp_path / "without", teacher__ema="null")
    shutil.rmtree(folder.parent)
    gloo(1, plain, inputs, tmp_path / "whole2")
    shutil.copytree(tmp_path / "whole2" / "checkpoints", tmp_path / "with" / "checkpoints")
    with pytest.raises(UserError, match=r"teacher\.ema: .* saved without a teacher .* leave it null"):
        gloo(1, resumed, inputs, tmp_path / "with")


def plain(inputs: Path, run_dir: Path) -> None:
    saves = Saves(build(inputs, run_dir))
    saves.begin(2)
    saves.finish()
