"""A teacher behind a real SGLang server against the same one on the training ranks: the same steps in any layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_opd.config.schema import OptimizerConfig
from megatron_opd.objectives import Objective, TokenWeight
from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.teacher import sglang as scoring
from megatron_opd.teacher.sglang import SGLangTeacher
from megatron_opd.train import train_step
from megatron_opd.training.evaluating import evaluate
from megatron_opd.training.teaching import teaching
from tests.data.tiny_tokenizer import write_prompts
from tests.gloo_pool import GlooPools
from tests.sglang_server import SGLangServer
from tests.tiny import VOCAB, recorded_rollouts
from tests.training.test_job import build
from tests.training.tiny_run import build_run

LSM = Objective(support="teacher_topk", k=8)
OPD = Objective("policy_gradient")
IW_OPD = Objective("policy_gradient", token_weight=TokenWeight("cumulative_share", gamma=0.5))
PRIVILEGED = "'{prompt} be brief {prompt}'"
NAMES = {LSM: "lsm", OPD: "opd", IW_OPD: "iw-opd"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sglang: SGLangServer) -> Path:
    """`teacher`, which the server has, a `student`, and the teacher as a student, `same`; with tokenizers, prompts."""
    folder = tmp_path_factory.mktemp("served")
    for name, model in (("teacher", 0), ("student", 1), ("same", 0)):
        sglang.link(model, folder / name)
    write_prompts(folder / "prompts.jsonl", 12)
    return folder


def both_steps(
    layout: ParallelLayout, folder: Path, url: str, objective: Objective, student: str = "student"
) -> list[tuple[dict[str, float], dict[str, torch.Tensor]]]:
    """(sums, main gradients) with the teacher on these ranks, and with the one at `url`."""
    whole = OptimizerConfig(distributed=False)
    run = build_run(layout, folder, student_name=student, optimizer=whole, objective=objective)
    packed = run.pack(recorded_rollouts(7))
    found = [(run.accumulate(packed), run.gradients())]
    k = objective.k if objective.support != "full" else 0
    teacher = SGLangTeacher(run.groups, vocab_size=VOCAB, k=k, request_tokens=11)
    if teacher.asks:
        teacher.connect([url], concurrency=16)
    run.objective = replace(run.objective, teacher=teacher, objective=replace(objective, served_at=1.0))
    found.append((run.accumulate(packed), run.gradients()))
    teacher.close()
    return found


@pytest.mark.parametrize(
    ("layout", "objective"),
    [
        (ParallelLayout(), OPD),
        (ParallelLayout(tensor=2), LSM),
        (ParallelLayout(data=2), IW_OPD),
        (ParallelLayout(context=2), LSM),
        (ParallelLayout(pipeline=2), OPD),
        pytest.param(ParallelLayout(context=2), IW_OPD, marks=pytest.mark.full),
        pytest.param(ParallelLayout(tensor=2, pipeline=2), LSM, marks=pytest.mark.full),
        pytest.param(ParallelLayout(tensor=2, context=2), IW_OPD, marks=pytest.mark.full),
    ],
    ids=lambda value: str(value) if isinstance(value, ParallelLayout) else NAMES[value],
)
def test_loss_and_gradient_are_those_of_the_colocated_teacher(
    gloo: GlooPools, sglang: SGLangServer, folder: Path, layout: ParallelLayout, objective: Objective
) -> None:
    for colocated, served in gloo(layout.world_size, both_steps, layout, folder, sglang.url, objective):
        common = served[0].keys() & colocated[0].keys()
        assert served[0].keys() - common == {"reverse_kl_sampled"}
        for name in common:
            assert served[0][name] == pytest.approx(colocated[0][name], rel=1e-4, abs=1e-4), name
        for name, gradient in served[1].items():
            difference = (gradient - colocated[1][name]).norm()
            assert difference <= 1e-4 * colocated[1][name].norm() + 1e-6, name


@pytest.mark.parametrize("objective", [OPD, LSM], ids=NAMES.__getitem__)
def test_the_student_itself_as_teacher_is_at_no_distance(
    gloo: GlooPools, sglang: SGLangServer, folder: Path, objective: Objective
) -> None:
    (_, (sums, gradients)) = gloo(1, both_steps, ParallelLayout(), folder, sglang.url, objective, "same")[0]
    tokens = sums["weight"]
    assert sums["abs_log_gap"] / tokens < 1e-5 and abs(sums["reverse_kl_sampled"]) / tokens < 1e-5
    if objective is LSM:
        assert abs(sums["topk_divergence"]) / tokens < 1e-5
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) < 1e-4


def steps(folder: Path, run_dir: Path, url: str | None, **changes: Any) -> list[dict[str, float]]:
    """Two steps and an evaluation of a job, its teacher at `url` if that is given."""
    if url is not None:
        changes |= {"teacher__engine": "sglang", "teacher__sglang__urls": f"[{url}]"}
    job = build(folder, run_dir, **changes)
    said: list[str] = []
    with teaching(job, said.append):
        rows = [train_step(job, step)[0] for step in (1, 2)]
        if job.texts.heldout:
            with mock.patch.object(scoring, "score_body", wraps=scoring.score_body) as asked:
                rows.append(evaluate(job, 2))
            assert {call.args[1:] for call in asked.call_args_list} <= {(0, None)}, "sampled tokens only"
            assert asked.called == (isinstance(job.teacher, SGLangTeacher) and job.teacher.asks)
    return [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in rows]


def test_at_no_distance_on_the_students_own_likeliest_ids(
    gloo: GlooPools, sglang: SGLangServer, folder: Path, tmp_path: Path
) -> None:
    support: dict[str, Any] = {
        "objective__support": "student_topk",
        "objective__remainder": "bucket",
        "objective__k": 6,
    }
    itself: dict[str, Any] = {"student__path": folder / "same", "evaluation__prompts": "null"}
    row = gloo(1, steps, folder, tmp_path / "run", sglang.url, **support, **itself)[0][0]
    assert abs(row["topk_divergence"]) < 1e-5 and row["abs_log_gap"] < 1e-5
    assert 0.01 < row["teacher_mass"] < 0.99, "six ids, and the rest in a bucket"


@pytest.mark.parametrize(
    "changes",
    [
        {"objective__preset": "iw-opd"},
        {"objective__preset": "aopd", "training__updates_per_rollout": 2, "teacher__request_tokens": 3},
        {"objective__support": "student_topk_sampled", "objective__remainder": "bucket", "objective__k": 6},
        {"objective__preset": "lsm", "rollout__temperature": 0.7, "evaluation__prompts": "null"},
        {"objective__preset": "iw-opd", "teacher__prompt_template": PRIVILEGED},
        {
            "objective__support": "student_topk_sampled",
            "objective__remainder": "bucket",
            "objective__k": 6,
            "teacher__prompt_template": PRIVILEGED,
        },
    ],
    ids=["iw-opd", "aopd", "student_topk", "temperature", "own prompts", "student_topk, own prompts"],
)
def test_a_job_takes_the_same_steps(
    gloo: GlooPools, sglang: SGLangServer, folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    plain = {key: value for key, value in changes.items() if key != "teacher__request_tokens"}
    expected = gloo(1, steps, folder, tmp_path / "megatron", None, **plain)[0]
    found = gloo(1, steps, folder, tmp_path / "sglang", sglang.url, **changes)[0]
    for row, want in zip(found, expected, strict=True):
        unknown = {name for name in want if name.removeprefix("eval/") in ("reverse_kl", "teacher_entropy")}
        if "rollout__temperature" in changes:
            unknown |= {"log_gap", "abs_log_gap", "teacher_mass"}
        estimates = {name for name in row if name.endswith("reverse_kl_sampled")}
        assert set(row) - estimates == set(want) - unknown
        for name in set(row) - estimates:
            assert row[name] == pytest.approx(want[name], rel=1e-3, abs=1e-4), name


def test_a_job_whose_sequences_two_processes_share_takes_the_same_steps(
    gloo: GlooPools, sglang: SGLangServer, folder: Path, tmp_path: Path
) -> None:
    """The student's likeliest ids go to the shares of the teacher's sequences, and what is said of them comes back."""
    support = {
        "objective__support": "student_topk_sampled",
        "objective__remainder": "bucket",
        "objective__k": 6,
    }
    changes: dict[str, Any] = {**support, "teacher__prompt_template": PRIVILEGED}
    expected = gloo(1, steps, folder, tmp_path / "megatron", None, **changes)[0]
    found = gloo(2, steps, folder, tmp_path / "sglang", sglang.url, parallel__context=2, **changes)[0]
    for row, want in zip(found, expected, strict=True):
        common = set(row) & set(want)
        assert {"abs_log_gap", "teacher_mass", "grad_norm"} <= common or "eval/response_tokens" in common
        for name in common:
            assert row[name] == pytest.approx(want[name], rel=1e-3, abs=1e-4), name
