"""Several teachers, routed or mixed: loss and gradients are those of runs with one of them each, put together."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
from megatron_opd.data.routes import pack_by_route
from megatron_opd.objectives import Objective
from megatron_opd.parallel import cpu
from megatron_opd.parallel.groups import build_groups
from megatron_opd.preflight import check_models
from megatron_opd.teacher.teacher import Asked
from megatron_opd.training.models import load_models
from megatron_opd.training.relay import Relay, layout_of
from megatron_opd.training.student import build_student
from megatron_opd.training.update import ObjectivePass, Update, UpdateScale
from tests.gloo_pool import GlooPools
from tests.tiny import recorded_rollouts, save_tiny_model
from tests.training.tiny_run import TinyRun

Layout = dict[str, Any]
Found = tuple[dict[str, float], dict[str, torch.Tensor], list[str]]
IW: dict[str, Any] = preset_objective("iw-opd-exact")
AOPD: dict[str, Any] = preset_objective("aopd")
TOPK: dict[str, Any] = {"support": "teacher_topk", "k": 8, "remainder": "bucket"}
VPP2: Layout = {"pipeline": 2, "virtual_pipeline": 2}


@dataclass(frozen=True)
class Case:
    """Layouts of student and teachers (None: the student's), the `teacher` section, and what is scored."""

    teacher: dict[str, Any]
    processes: int = 1
    student: Layout = field(default_factory=dict)
    own: Layout | None = None
    payload: str = "hidden_states"
    objective: dict[str, Any] = field(default_factory=lambda: IW)
    head_chunk: int | None = None

    def __str__(self) -> str:
        layouts = [*self.student.items(), "own", *(self.own or {}).items()]
        return "-".join([*map(str, self.teacher), *map(str, layouts), self.payload]).replace(" ", "")

    def config(self, folder: Path) -> Config:
        """Of a run with these; what is not about models is never read."""
        given: dict[str, Any] = {"payload": self.payload, "parallel": self.own, **self.teacher}
        for key in ("path", "paths"):
            if key in given:
                names = given[key]
                paths = (
                    {name: str(folder / model) for name, model in dict(names).items()}
                    if key == "paths"
                    else None
                )
                given[key] = paths or str(folder / names)
        tree = {
            "run_dir": "r",
            "precision": "fp32",
            "student": {"path": str(folder / "student")},
            "teacher": given,
            "parallel": self.student,
            "data": {"prompts": "p", "max_prompt_tokens": 30},
            "rollout": {"max_new_tokens": 30},
            "training": {"microbatch_tokens": 96},
            "evaluation": {"prompts": "p"},
            "objective": {**self.objective, "head_chunk": self.head_chunk},
        }
        return Config.model_validate(tree)


BOTH = {"a": "teacher-a", "b": "teacher-b"}
TWICE = {"a": "teacher-a", "b": "teacher-a"}


def rollouts_of(*routes: str) -> list[Rollout]:
    """Of nine recorded rollouts, one of teacher b and the others of a, those of `routes`."""
    every = [replace(rollout, route="b" if i == 5 else "a") for i, rollout in enumerate(recorded_rollouts(9))]
    return [rollout for rollout in every if rollout.route in routes]


def observe(case: Case, folder: Path, rollouts: Sequence[Rollout]) -> Found:
    """Sums of one update with those of an evaluation, gradients by Hugging Face name, and the microbatches' teachers.

    Every rank calls it.
    """
    cpu.install()
    torch.set_num_threads(1)
    config = case.config(folder)
    checked = check_models(config, dist.get_world_size())
    layout = layout_of(checked.parallel)
    groups = build_groups(layout)
    device = torch.device("cpu")
    chunks, teacher, _ = load_models(
        config, checked, layout, groups, device, Relay.of(checked, config.timeouts)
    )
    student = build_student(chunks, OptimizerConfig(distributed=False), groups, precision="fp32", steps=1)
    run = ObjectivePass(
        chunks[-1], teacher, checked.objective, checked.vocab_size, groups, head_chunk=case.head_chunk
    )
    pack_one = partial(
        pack,
        dp_size=layout.data,
        token_budget=config.training.microbatch_tokens,
        alignment=alignment_of_run(config),
        count_multiple=layout.microbatch_multiple,
    )
    whole, routes = pack_by_route(rollouts, pack_one)
    mine = [each.shard(groups.cp.rank(), groups.cp.size()) for each in whole[groups.dp.rank()]]

    asked = Asked(mine, whole, routes)
    update = Update(mine, UpdateScale.of(whole), teacher.score(asked))
    student.zero_grad()
    sums = run.run(student.ddps, update).sums
    plain = replace(run, objective=Objective())
    evaluation = replace(update, payloads=teacher.score(replace(asked, evaluation=True)))
    sums["evaluated"] = plain.run(student.ddps, evaluation, forward_only=True).sums["reverse_kl"]
    return sums, TinyRun(layout, groups, checked.student, student, run).gradients(), routes


def alone(
    folder: Path, objective: dict[str, Any], payload: str, jobs: Sequence[tuple[str, tuple[str, ...]]]
) -> list[Found]:
    """What one process with one teacher observes of the rollouts of some routes, for each job."""
    return [
        observe(Case({"path": model}, objective=objective, payload=payload), folder, rollouts_of(*routes))
        for model, routes in jobs
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, and teachers of other sizes with larger vocabularies, padded to 384 rows at TP 1 and 512 at TP 2."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "student", seed=1, vocab=290)
    save_tiny_model(folder / "teacher-a", seed=2, hidden=96, tied=False, vocab=310)
    save_tiny_model(folder / "teacher-b", seed=3, layers=8, vocab=300)
    return folder


JOBS = [("teacher-a", ("a",)), ("teacher-b", ("b",)), ("teacher-a", ("a", "b")), ("teacher-b", ("a", "b"))]


@pytest.fixture(scope="module")
def single(gloo: GlooPools, folder: Path) -> Any:
    """`single(case)`: what one process observes in each of the jobs with the case's objective and payload."""
    known: dict[str, list[Found]] = {}

    def of(case: Case) -> list[Found]:
        key = repr((case.objective, case.payload))
        if key not in known:
            known[key] = gloo(1, alone, folder, case.objective, case.payload, JOBS)[0]
        return known[key]

    return of


def weighted(trees: Sequence[dict[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
    """The weighted sum of each entry."""
    return {
        name: sum(weight * tree[name] for weight, tree in zip(weights, trees, strict=True))
        for name in trees[0]
    }


def assert_same(found: Found, sums: dict[str, float], gradients: dict[str, torch.Tensor]) -> None:
    compared = {
        name: value for name, value in sums.items() if "mismatch" not in name and "compared" not in name
    }
    assert {name: found[0][name] for name in compared} == pytest.approx(compared, rel=1e-5, abs=1e-6)
    assert found[1].keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def tokens_of(*routes: str) -> int:
    return sum(len(rollout.response_ids) for rollout in rollouts_of(*routes))


def of_one(found: Found, teacher: str) -> tuple[float, float]:
    """What is counted of one teacher: tokens, and the sum of the reverse KL."""
    sums = found[0]
    distance = next(name for name in sums if name.startswith(f"teacher/{teacher}/reverse_kl"))
    return sums[f"teacher/{teacher}/tokens"], sums[distance]


def distance_of(found: Found) -> float:
    return found[0].get("reverse_kl", found[0].get("reverse_kl_sampled", 0.0))


ROUTED: dict[str, Any] = {"paths": BOTH, "route_field": "domain"}
MIXED: dict[str, Any] = {"paths": BOTH, "weights": {"a": 6.0, "b": 2.0}}
ROUTED_CASES = [
    Case(ROUTED, 2, {"tensor": 2}),
    Case(ROUTED, 2, {"data": 2}, objective=TOPK, payload="topk"),
    Case(ROUTED, 2, {"pipeline": 2}, objective=AOPD, head_chunk=7),
    Case(ROUTED, 2, VPP2),
    Case(ROUTED, 2, {"data": 2}, {"tensor": 2}, head_chunk=7),
    Case(ROUTED, 2, {"tensor": 2}, {"pipeline": 2}, objective=TOPK, payload="topk"),
]
MIXED_CASES = [
    Case(MIXED, 2, {"tensor": 2}),
    Case(MIXED, 2, {"data": 2}, objective=TOPK, payload="topk"),
    Case(MIXED, 2, {"pipeline": 2}, objective=AOPD, head_chunk=7),
    Case(MIXED, 2, {"context": 2}, {"data": 2}, objective=AOPD),
]


@pytest.mark.parametrize("case", ROUTED_CASES, ids=str)
def test_routed_is_each_half_with_its_teacher(gloo: GlooPools, folder: Path, single: Any, case: Case) -> None:
    """Summed, and divided by the tokens of both; with two replicas one of them has no rollout of teacher b."""
    halves = single(case)[:2]
    counts = [tokens_of("a"), tokens_of("b")]
    sums = weighted([each[0] for each in halves], [1, 1])
    gradients = weighted([each[1] for each in halves], [count / sum(counts) for count in counts])
    for found in gloo(case.processes, observe, case, folder, rollouts_of("a", "b")):
        assert_same(found, sums, gradients)
        for name, half, count in zip("ab", halves, counts, strict=True):
            assert of_one(found, name) == pytest.approx((count, distance_of(half)), rel=1e-5)
        assert found[2] == sorted(found[2]) and set(found[2]) == {"a", "b"}
        if case.student == VPP2:
            assert found[2].count("a") % 2 == found[2].count("b") % 2 == 0


@pytest.mark.parametrize("case", MIXED_CASES, ids=str)
def test_mixed_is_the_weighted_sum(gloo: GlooPools, folder: Path, single: Any, case: Case) -> None:
    both = single(case)[2:]
    sums, gradients = (weighted([each[i] for each in both], [0.75, 0.25]) for i in (0, 1))
    for found in gloo(case.processes, observe, case, folder, rollouts_of("a", "b")):
        assert_same(found, sums, gradients)
        for name, one in zip("ab", both, strict=True):
            assert of_one(found, name) == pytest.approx((tokens_of("a", "b"), distance_of(one)), rel=1e-5)


@pytest.mark.parametrize(
    "teacher",
    [
        {"paths": {"a": "teacher-a"}, "weights": {"a": 1.0}},
        {"paths": TWICE, "weights": {"a": 0.3, "b": 0.7}},
        {"paths": TWICE, "route_field": "domain"},
    ],
    ids=["one", "mixed-twice", "routed-twice"],
)
def test_the_same_teacher_by_several_names_is_one(
    gloo: GlooPools, folder: Path, single: Any, teacher: dict[str, Any]
) -> None:
    case = Case(teacher, objective=AOPD)
    expected = single(case)[2]
    assert_same(gloo(1, observe, case, folder, rollouts_of("a", "b"))[0], *expected[:2])


def test_a_teacher_without_rollouts_forwards_nothing(gloo: GlooPools, folder: Path, single: Any) -> None:
    case = Case(ROUTED, 2, {"data": 2}, {"tensor": 2})
    for found in gloo(2, observe, case, folder, rollouts_of("a")):
        assert_same(found, *single(case)[0][:2])
        assert set(found[2]) == {"a"} and of_one(found, "b") == (0.0, 0.0)


@pytest.mark.parametrize(
    ("use", "student", "own"),
    [
        ({"route_field": "domain"}, {"tensor": 2}, None),
        ({"weights": {"a": 1.0, "b": 2.0}}, {"data": 2}, {"pipeline": 2}),
    ],
    ids=["routed", "mixed"],
)
def test_the_student_as_its_teachers_is_no_distance(
    gloo: GlooPools, folder: Path, use: dict[str, Any], student: Layout, own: Layout | None
) -> None:
    case = Case({"paths": {"a": "student", "b": "student"}, **use}, 2, student, own)
    for sums, gradients, _ in gloo(2, observe, case, folder, rollouts_of("a", "b")):
        distances = [value for name, value in sums.items() if name.endswith("reverse_kl")]
        assert len(distances) == 3 and max(map(abs, distances)) / tokens_of("a", "b") < 1e-5
        assert abs(sums["evaluated"]) / tokens_of("a", "b") < 1e-5
        assert all(gradient.abs().max() < 1e-5 for gradient in gradients.values())


def test_prompts_of_the_teachers_own(gloo: GlooPools, folder: Path) -> None:
    """With context ranks, whose shares of what a teacher reads hold other response tokens than the student's."""
    given = [
        replace(rollout, teacher_prompt_ids=[5 + i] * (i % 4 + 1) + rollout.prompt_ids)
        for i, rollout in enumerate(rollouts_of("a", "b"))
    ]
    (expected,) = gloo(1, observe, Case({"path": "teacher-a"}), folder, given)
    (without,) = gloo(1, observe, Case({"path": "teacher-a"}), folder, rollouts_of("a", "b"))
    assert abs(expected[0]["reverse_kl"] - without[0]["reverse_kl"]) > 1e-3
    for use in ({"route_field": "domain"}, {"weights": {"a": 0.3, "b": 0.7}}):
        case = Case({"paths": TWICE, **use}, 2, {"context": 2})
        for found in gloo(2, observe, case, folder, given):
            assert_same(found, *expected[:2])
