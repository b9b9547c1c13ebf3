"""A teacher that reads prompts of its own: loss and gradients against transformers, in layouts, and whole jobs."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_opd.config.schema import OptimizerConfig
from megatron_opd.data.prompts import Prompt
from megatron_opd.data.rollouts import Rollout
from megatron_opd.objectives import Objective
from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.train import train_step
from megatron_opd.training.evaluating import evaluate
from tests.data.tiny_tokenizer import WORDS
from tests.gloo_pool import GlooPools
from tests.tiny import recorded_rollouts, with_teacher_prompts
from tests.training.test_job import build, save_job_models
from tests.training.tiny_run import build_run, save_pair

ROLLOUTS = 9
TEMPLATE = "'{prompt} be brief {solution}'"
LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tensor=2, sequence_parallel=True),
    ParallelLayout(pipeline=2),
    ParallelLayout(data=2),
    ParallelLayout(context=2),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_pair(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_job_models(folder)
    write_solved_prompts(folder / "prompts.jsonl", 12)
    return folder


def write_solved_prompts(path: Path, count: int) -> None:
    """Prompts of 3 to 7 words with solutions of 1 to 9."""
    rows = [
        {
            "prompt": " ".join(WORDS[(i * k) % 8] for k in range(1, 4 + i % 5)),
            "solution": " ".join(WORDS[(i + 3 * k) % 8] for k in range(1 + 5 * i % 9)),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rollouts() -> list[Rollout]:
    return with_teacher_prompts(recorded_rollouts(ROLLOUTS))


def ours(layout: ParallelLayout, models: Path) -> tuple[float, dict[str, Tensor], int]:
    """Mean reverse KL, gradients of it, and how many microbatches made them."""
    run = build_run(layout, models, objective=Objective(), optimizer=OptimizerConfig(distributed=False))
    packed = run.pack(rollouts())
    sums = run.accumulate(packed)
    tokens = sum(len(rollout.response_ids) for rollout in rollouts())
    return sums["reverse_kl"] / tokens, run.gradients(), len(packed[0])


@cache
def expected(models: Path) -> tuple[float, dict[str, Tensor]]:
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(models / name).double() for name in ("student-True", "teacher")
    )
    loss, tokens = torch.zeros((), dtype=torch.float64), 0
    for rollout in rollouts():
        length = len(rollout.response_ids)
        p_s, p_t = (
            model(torch.tensor([prompt + rollout.response_ids])).logits[0, -length - 1 : -1].log_softmax(-1)
            for model, prompt in ((student, rollout.prompt_ids), (teacher, rollout.teacher_prompt_ids))
        )
        loss = loss + (p_s.exp() * (p_s - p_t.detach())).sum()
        tokens += length
    (loss / tokens).backward()
    return loss.item() / tokens, {name: p.grad for name, p in student.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_loss_and_gradients_are_those_of_the_teachers_own_sequences(
    gloo: GlooPools, models: Path, layout: ParallelLayout
) -> None:
    loss, gradients = expected(models)
    for value, found, microbatches in gloo(layout.world_size, ours, layout, models):
        assert microbatches > 1
        assert value == pytest.approx(loss, rel=1e-5)
        assert found.keys() == gradients.keys() - {"lm_head.weight"}
        for name, gradient in found.items():
            gap = (gradient - gradients[name]).norm() / gradients[name].norm()
            assert gap < 1e-5, name


def job_steps(inputs: Path, run_dir: Path, **changes: Any) -> list[dict[str, float]]:
    """Two steps and an evaluation."""
    job = build(inputs, run_dir, **changes)
    rows = [*(train_step(job, step)[0] for step in (1, 2)), evaluate(job, 2)]
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


def itself(inputs: Path, run_dir: Path, template: str) -> dict[str, float]:
    return evaluate(
        build(inputs, run_dir, teacher__path=inputs / "student", teacher__prompt_template=template), 0
    )


def test_the_student_with_the_same_prompt_teaches_nothing(
    gloo: GlooPools, inputs: Path, tmp_path: Path
) -> None:
    same, privileged = (
        gloo(1, itself, inputs, tmp_path / name, template)[0]["eval/reverse_kl"]
        for name, template in (("same", "'{prompt}'"), ("privileged", TEMPLATE))
    )
    assert abs(same) < 1e-6 < 1e-2 < privileged


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher__payload": "topk", "objective__preset": "mopd", "parallel__tensor": 2},
        {"teacher__payload": "sampled", "objective__preset": "iw-opd", "training__updates_per_rollout": 2},
        {"objective__preset": "aopd", "parallel__pipeline": 2, "parallel__virtual_pipeline": 2},
        {"teacher__payload": "topk", "objective__preset": "mopd", "parallel__context": 2},
    ],
    ids=["topk", "sampled", "interleaved", "topk-CP2"],
)
def test_jobs_with_every_payload_and_layout_take_the_same_steps(
    gloo: GlooPools, inputs: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes = changes | {"teacher__prompt_template": TEMPLATE, "teacher__max_prompt_tokens": 40}
    plain = {k: v for k, v in changes.items() if k not in ("teacher__payload",) and "parallel" not in k}
    world = 2 if any("parallel" in key for key in changes) else 1
    wanted = gloo(1, job_steps, inputs, tmp_path / "plain", **plain)[0]
    found = gloo(world, job_steps, inputs, tmp_path / "run", **changes)[0]
    for row, want in zip(found, wanted, strict=True):
        for name in set(want) & set(row):
            assert row[name] == pytest.approx(want[name], rel=1e-3, abs=1e-4), name


def drawn_from(inputs: Path, run_dir: Path) -> tuple[list[Prompt], list[Rollout]]:
    job = build(inputs, run_dir, teacher__prompt_template=TEMPLATE)
    prompts = job.prompts.take(3)
    return prompts, job.draw(prompts, step=0, seed=0, samples=2)


def test_responses_are_drawn_from_the_students_prompt(gloo: GlooPools, inputs: Path, tmp_path: Path) -> None:
    prompts, drawn = gloo(1, drawn_from, inputs, tmp_path / "run")[0]
    for rollout, prompt in zip(drawn, [prompt for prompt in prompts for _ in range(2)], strict=True):
        assert (rollout.prompt_ids, rollout.teacher_prompt_ids) == (prompt.token_ids, prompt.teacher_ids)
        assert len(prompt.teacher_ids) > len(prompt.token_ids)
