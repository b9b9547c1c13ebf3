"""Every kind of payload of a Megatron teacher: the loss and the gradient are those of hidden states, in any layout."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_opd.config.schema import SERVED_KINDS, OptimizerConfig, PayloadKind
from megatron_opd.models.gpt import DTYPES
from megatron_opd.objectives import Gate, Objective, TokenWeight
from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.teacher.payload import (
    PayloadFormat,
    TeacherPayload,
    WholeLogits,
    tensors_of,
)
from megatron_opd.teacher.projection import distribution
from megatron_opd.teacher.teacher import Asked
from tests.gloo_pool import GlooPools
from tests.tiny import VOCAB, recorded_rollouts
from tests.training.tiny_run import TinyRun, build_run, save_pair

HIDDEN = 96  # of save_pair's teacher
K = 8
IW = TokenWeight("cumulative_share", gamma=0.5)
TOPK: dict[str, Any] = {"support": "teacher_topk", "k": K}
AOPD = Objective(
    "policy_gradient", gate=Gate("aopd", divergence="forward_kl"), remainder="none", temperature=0.7, **TOPK
)


@dataclass(frozen=True)
class Case:
    """An objective with a kind of payload in a layout."""

    kind: PayloadKind
    objective: Objective
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    head_chunk: int | None = None
    precision: str = "fp32"

    def __str__(self) -> str:
        objective = self.objective
        what = objective.divergence if objective.support == "full" else objective.remainder
        return f"{self.kind}-{what}-{self.layout}-{self.precision}"


TP2, CP2 = ParallelLayout(tensor=2), ParallelLayout(context=2)
CASES = [
    Case("hidden_states", Objective("forward_kl"), head_chunk=3),
    Case("logits", Objective(temperature=0.7, token_weight=IW)),
    Case("logits", Objective("jsd"), TP2, 3),
    Case("logits", Objective(support="student_topk", k=K, temperature=0.7), CP2),
    Case("topk", AOPD, ParallelLayout(pipeline=2), 3),
    Case("topk", Objective(**TOPK, temperature=0.7, token_weight=IW), CP2),
    Case("topk", Objective(**TOPK, remainder="bucket", temperature=0.7), TP2),
    Case("topk", Objective("forward_kl", **TOPK, remainder="none", temperature=0.7), head_chunk=3),
    Case("topk", Objective(**TOPK, remainder="mass_correction"), ParallelLayout(tensor=2, context=2), 3),
    Case("topk", Objective(**TOPK, remainder="sampled_tail", temperature=0.7), TP2),
    Case("topk", Objective(**(TOPK | {"support": "teacher_topk_sampled"}), temperature=0.7)),
    Case("sampled", Objective("policy_gradient", temperature=0.7), TP2),
    Case("sampled", Objective("policy_gradient", token_weight=IW, temperature=0.7), head_chunk=3),
    Case("sampled", Objective("policy_gradient", token_weight=IW), CP2),
    # The same rounded logits, of which everything else is computed in float32.
    Case("hidden_states", Objective(), precision="bf16"),
    Case("logits", Objective(), precision="bf16"),
    Case("topk", Objective(**TOPK, temperature=0.7), TP2, 3, "bf16"),
    Case("sampled", Objective("policy_gradient", temperature=0.7), precision="bf16"),
]


class Carried(MegatronTeacher):
    """Its payloads go through the tensors that a transport would carry, of which it has to know everything."""

    form: PayloadFormat

    def score(self, asked: Asked) -> list[TeacherPayload | None]:
        found = super().score(asked)
        return [
            None if payload is None else self._carried(payload, int(microbatch.mask_T.sum()))
            for payload, microbatch in zip(found, asked.microbatches, strict=True)
        ]

    def _carried(self, payload: TeacherPayload, positions: int) -> TeacherPayload:
        tensors = tensors_of(payload)
        assert sum(each.untyped_storage().nbytes() for each in tensors) == (
            self.form.bytes_per_position * positions
        )
        for tensor, (trailing, dtype) in zip(tensors, self.form.tensors, strict=True):
            assert tensor.shape == (positions, *trailing) and tensor.dtype == dtype
            assert tensor.is_contiguous()
        return self.form.payload([tensor.clone() for tensor in tensors])


def hand_over(run: TinyRun, case: Case) -> None:
    """Have the run's teacher hand over what the case says."""
    plain, objective = run.objective.teacher, case.objective
    assert isinstance(plain, MegatronTeacher)
    form = PayloadFormat(case.kind, HIDDEN, VOCAB, DTYPES[case.precision], K, objective.temperature)
    teacher = Carried(plain.chunks, run.groups, form=form, head_chunk=case.head_chunk)
    teacher.form = form
    if case.kind in SERVED_KINDS:
        objective = replace(objective, served_at=objective.temperature)
    run.objective = replace(run.objective, teacher=teacher, objective=objective)


def both(
    case: Case, folder: Path, student: str | None = None
) -> list[tuple[dict[str, float], dict[str, torch.Tensor]]]:
    """(sums, main gradients) with hidden states, and with the payload of the case."""
    run = build_run(
        case.layout,
        folder,
        student_name=student,
        optimizer=OptimizerConfig(distributed=False),
        objective=case.objective,
        head_chunk=case.head_chunk,
        precision=case.precision,
    )
    packed = run.pack(recorded_rollouts(7))
    found = [(run.accumulate(packed), run.gradients())]
    hand_over(run, case)
    return [*found, (run.accumulate(packed), run.gradients())]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_pair(folder)
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradient_are_those_of_hidden_states(gloo: GlooPools, models: Path, case: Case) -> None:
    for (want, gradients), (got, found) in gloo(case.layout.world_size, both, case, models):
        known = set(want) - ({"reverse_kl", "teacher_entropy"} if case.kind in SERVED_KINDS else set())
        assert set(got) - {"reverse_kl_sampled"} == known - {"reverse_kl_sampled"}
        for name in known:
            assert got[name] == pytest.approx(want[name], rel=1e-5, abs=1e-5 * want["weight"]), name
        for name, gradient in gradients.items():
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize(
    ("case", "distance"),
    [
        (Case("logits", Objective()), "reverse_kl"),
        (Case("topk", Objective(**TOPK, temperature=0.7)), "topk_divergence"),
        (Case("sampled", Objective("policy_gradient", temperature=0.7)), "abs_log_gap"),
    ],
    ids=["logits", "topk", "sampled"],
)
def test_the_teacher_itself_is_at_no_distance(
    gloo: GlooPools, models: Path, case: Case, distance: str
) -> None:
    _, (sums, gradients) = gloo(1, both, case, models, "teacher")[0]
    assert abs(sums[distance]) / sums["weight"] < 1e-5
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) < 1e-4


def cut(vocab: int, width: int) -> torch.Tensor:
    """This rank's columns of whole logits that are their ids."""
    logits_NV = torch.arange(vocab, dtype=torch.float32).expand(3, -1)
    group = dist.group.WORLD
    assert group is not None
    found = distribution(WholeLogits(logits_NV), None, width, group, chunked=True)
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("width", [75, 80, 100, 200])
def test_whole_logits_are_cut_as_the_students_head_is(gloo: GlooPools, width: int) -> None:
    """Into padded shards, of which the last may have no real id."""
    shards = gloo(2, cut, 150, width)
    assert all(shard.shape == (3, width) for shard in shards)
    assert torch.equal(torch.cat(shards, 1)[:, :150], torch.arange(150.0).expand(3, -1))
