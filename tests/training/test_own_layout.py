"""A teacher in another layout, or on ranks of its own: loss and gradients are those of one process with both models."""

import math
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_opd.config.layout_checks import alignment_of_run
from megatron_opd.config.presets import preset_objective
from megatron_opd.config.schema import Config, OptimizerConfig
from megatron_opd.data.packing import pack
from megatron_opd.data.rollouts import Rollout
from megatron_opd.objectives import Objective
from megatron_opd.parallel import cpu
from megatron_opd.parallel.groups import build_groups
from megatron_opd.preflight import check_models
from megatron_opd.teacher.separate import serve
from megatron_opd.teacher.teacher import Asked
from megatron_opd.training.models import load_models, load_separate
from megatron_opd.training.relay import Relay, layout_of
from megatron_opd.training.student import build_student, join_build
from megatron_opd.training.update import ObjectivePass, Update, UpdateScale
from megatron_opd.watch.phases import Phases
from tests.checkpoint.models import write_hf
from tests.gloo_pool import GlooPools
from tests.tiny import recorded_rollouts, save_tiny_model
from tests.training.tiny_run import TinyRun

Layout = dict[str, Any]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "hidden_states": preset_objective("iw-opd-exact"),
    "logits": preset_objective("iw-opd-exact"),
    "topk": {"support": "teacher_topk", "k": 8, "remainder": "bucket"},
    "sampled": {"divergence": "policy_gradient"},
}
SP2: Layout = {"tensor": 2, "sequence_parallel": True}
VPP2: Layout = {"pipeline": 2, "virtual_pipeline": 2}
OWN: Layout = {"separate": True}
EXPERTS: Layout = {"data": 2, "expert": 2}
ONE_TOKEN = [Rollout("0", 0, [7, 20, 33, 46, 59, 72, 85], [98], [-1.0], "length", 0)]


@dataclass(frozen=True)
class Case:
    """Layouts of student and teacher (None: the student's), and what the teacher hands over."""

    processes: int
    student: Layout
    teacher: Layout | None
    payload: str = "hidden_states"
    models: tuple[str, str] = ("student", "teacher")
    head_chunk: int | None = None
    offload: bool = False  # of the teacher's weights while they are not used
    full: bool = False  # runs with `make test-full` only
    rollouts: list[Rollout] = field(default_factory=lambda: recorded_rollouts(9))

    @property
    def separate(self) -> int:
        """Ranks of the teacher alone."""
        layout = self.teacher or {}
        sizes = [layout.get(name, 1) for name in ("tensor", "pipeline", "context", "data")]
        return math.prod(sizes) if layout.get("separate") else 0

    def config(self, folder: Path) -> Config:
        """Of a run with these; what is not about models is never read."""
        student, teacher = (str(folder / name) for name in self.models)
        own = {} if self.teacher is None else {"parallel": self.teacher}
        tree = {
            "run_dir": "r",
            "precision": "fp32",
            "student": {"path": student},
            "teacher": {"path": teacher, "payload": self.payload, "offload": self.offload, **own},
            "parallel": self.student,
            "data": {"prompts": "p", "max_prompt_tokens": 30},
            "rollout": {"max_new_tokens": 30},
            "training": {"microbatch_tokens": 96},
            "evaluation": {"prompts": "p"},
            "objective": OBJECTIVES[self.payload] | {"head_chunk": self.head_chunk},
        }
        return Config.model_validate(tree)

    def __str__(self) -> str:
        def name(layout: Layout | None) -> str:
            return "+".join(f"{key}{int(size)}" for key, size in (layout or {}).items())

        return f"{name(self.student)}-{name(self.teacher)}-{self.payload}"


def observe(case: Case, folder: Path) -> tuple[dict[str, float], dict[str, torch.Tensor]] | None:
    """Sums of one update, and its gradients by Hugging Face name; None on a rank of a separate teacher.

    Every rank calls it. What is scored for the update is read after what is scored for an evaluation has been ordered.
    """
    cpu.install()
    torch.set_num_threads(1)
    config = case.config(folder)
    checked = check_models(config, dist.get_world_size())
    layout = layout_of(checked.parallel)
    groups = build_groups(layout)
    device = torch.device("cpu")
    relay = Relay.of(checked, config.timeouts)
    if relay is not None and relay.separate and dist.get_rank() >= relay.layouts.first:
        model = load_separate(config, checked, relay, device)
        join_build()
        assert relay.orders is not None
        serve(
            model,
            relay.layouts,
            relay.payload_group,
            relay.orders,
            lambda step: None,
            lambda: None,
            device=device,
            phases=Phases(),
        )
        return None
    chunks, teacher, _ = load_models(config, checked, layout, groups, device, relay)
    settings = OptimizerConfig(
        distributed=False
    )  # the distributed optimizer reduces a shard of the gradient only
    student = build_student(chunks, settings, groups, precision="fp32", steps=1)
    run = ObjectivePass(
        chunks[-1], teacher, checked.objective, checked.vocab_size, groups, head_chunk=case.head_chunk
    )
    packed = pack(
        case.rollouts,
        dp_size=layout.data,
        token_budget=config.training.microbatch_tokens,
        alignment=alignment_of_run(config),
        count_multiple=layout.microbatch_multiple,
    )
    mine = [each.shard(groups.cp.rank(), groups.cp.size()) for each in packed[groups.dp.rank()]]
    asked = Asked(mine, packed)
    update = Update(mine, UpdateScale.of(packed), teacher.score(asked))
    evaluation = replace(update, payloads=teacher.score(replace(asked, evaluation=True)))
    student.zero_grad()
    sums = run.run(student.ddps, update).sums
    plain = replace(run, objective=Objective())
    sums["evaluated"] = plain.run(student.ddps, evaluation, forward_only=True).sums["reverse_kl"]
    teacher.finish()
    return sums, TinyRun(layout, groups, checked.student, student, run).gradients()


CASES = [
    Case(2, {"tensor": 2}, {"pipeline": 2}, offload=True),
    Case(2, {"pipeline": 2}, SP2, head_chunk=7),
    Case(2, {"context": 2}, {"data": 2}, head_chunk=7),
    Case(2, {"data": 2}, {"context": 2}, "topk"),
    Case(2, {"context": 2}, VPP2, "logits"),
    Case(2, {"data": 2}, {"tensor": 2}, "sampled"),
    Case(2, {"data": 2}, {"data": 2}, "topk", head_chunk=7),
    Case(2, {"data": 2}, {"pipeline": 2}, rollouts=ONE_TOKEN),
    Case(2, {"context": 2}, {"tensor": 2}, rollouts=ONE_TOKEN),
    Case(4, SP2 | {"context": 2}, VPP2 | {"data": 2}),
    Case(4, VPP2 | {"data": 2}, SP2 | {"context": 2}, "logits"),
    Case(4, {"tensor": 2, "data": 2}, {"pipeline": 2, "context": 2}, "sampled"),
    Case(4, {"pipeline": 2, "context": 2}, {"tensor": 2, "pipeline": 2}, "topk"),
    Case(2, {}, OWN),
    Case(3, {}, OWN | {"pipeline": 2}, "topk", head_chunk=7),
    Case(3, {"tensor": 2}, OWN, "logits"),
    Case(3, {"data": 2}, OWN, "sampled"),
    Case(3, {"data": 2}, OWN, rollouts=ONE_TOKEN),
    Case(4, {"pipeline": 2}, OWN | SP2, head_chunk=7),
    Case(4, {"context": 2}, OWN | {"data": 2}),
    Case(4, VPP2, OWN | {"context": 2}, "topk"),
    Case(4, {"tensor": 2}, OWN | VPP2),
    Case(4, EXPERTS, OWN | EXPERTS, models=("moe-student", "moe-teacher")),
    Case(6, {"tensor": 2, "data": 2}, OWN | VPP2, full=True),
    Case(6, {"data": 2}, OWN | {"tensor": 2, "data": 2}, "logits", full=True),
    Case(6, {"pipeline": 2}, OWN | {"pipeline": 2, "context": 2}, "topk", head_chunk=7, full=True),
    Case(4, {"context": 2}, OWN | {"pipeline": 2}, rollouts=ONE_TOKEN, full=True),
    Case(4, {"data": 2, "tensor": 2}, {"data": 4}, "sampled", full=True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose vocabularies differ, and are padded to 384 rows at TP 1 and to 512 at TP 2."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "student", seed=1, vocab=300)
    save_tiny_model(folder / "teacher", seed=2, hidden=96, tied=False, vocab=310)
    sizes: dict[str, Any] = {"vocab_size": 300, "max_position_embeddings": 128}
    write_hf(folder / "moe-student", "qwen3_moe", tied=True, **sizes)
    write_hf(folder / "moe-teacher", "qwen3_moe", tied=False, norm_topk_prob=False, **sizes)
    return folder


@pytest.fixture(scope="module")
def one_process(gloo: GlooPools, folder: Path) -> Any:
    """`one_process(payload, models, one_token)`: what one process with both models observes."""

    def alone(payload: str, models: tuple[str, str], one_token: bool) -> Any:
        case = Case(1, {}, None, payload, models)
        return gloo(1, observe, replace(case, rollouts=ONE_TOKEN) if one_token else case, folder)[0]

    return cache(alone)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=[pytest.mark.full] if case.full else []) for case in CASES],
)
def test_as_in_one_process(gloo: GlooPools, folder: Path, one_process: Any, case: Case) -> None:
    sums, gradients = one_process(case.payload, case.models, case.rollouts == ONE_TOKEN)
    ranks = [rank for rank in gloo(case.processes, observe, case, folder) if rank is not None]
    assert len(ranks) == case.processes - case.separate
    for found, found_gradients in ranks:
        assert found == pytest.approx(sums, rel=1e-5, abs=1e-6)
        assert found_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (found_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_the_payload_does_not_matter_to_one_process(one_process: Any) -> None:
    """Of hidden states and of logits the reference is the same: the rows above compare with more than themselves."""
    hidden, logits = (
        one_process(payload, ("student", "teacher"), False)[0] for payload in ("hidden_states", "logits")
    )
    assert logits == pytest.approx(hidden, rel=1e-5)


@pytest.mark.parametrize("payload", ["hidden_states", "logits"])
def test_a_teacher_that_is_the_student_has_no_divergence(gloo: GlooPools, folder: Path, payload: str) -> None:
    case = Case(2, {"tensor": 2}, {"pipeline": 2}, payload, models=("student", "student"))
    for sums, gradients in gloo(case.processes, observe, case, folder):
        assert abs(sums["reverse_kl"]) < 1e-5 * 137
        assert max(float(gradient.abs().max()) for gradient in gradients.values()) < 1e-4
