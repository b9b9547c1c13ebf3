"""What is predicted to be sent against what a step sends: every collective counted, by group and kind."""

from typing import Any

import pytest

from megatron_opd.config.schema import Config
from megatron_opd.plan.traffic import stage_traffic
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.training.average import WeightAverage
from tests.gloo_pool import GlooPools
from tests.plan.runs import config, ranks_of, setting_of
from tools.bench.plan_check import Built, Sizes
from tools.bench.traffic import by_group, group_names, recorded_traffic

SMALL = 8192  # bytes: metrics, norms and shapes, which the plan leaves out
SP = {"parallel__tensor": 2, "parallel__sequence_parallel": True}
RUNS: dict[str, dict[str, Any]] = {
    "TP2": {"parallel__tensor": 2},
    "TP2 recompute": {"parallel__tensor": 2, "training__recompute": "full", "objective__head_chunk": 100},
    "TP2 SP": SP,
    "TP2 SP recompute": {**SP, "training__recompute": "full"},
    "PP2": {"parallel__pipeline": 2},
    "CP2": {"parallel__context": 2},
    "PP2 VPP2": {
        "parallel__pipeline": 2,
        "parallel__virtual_pipeline": 2,
        "training__microbatch_tokens": 256,
    },
    "DP2": {"parallel__data": 2},
    "TP2, logits": {"parallel__tensor": 2, "teacher__payload": "logits"},
    "TP2, top-K": {
        "parallel__tensor": 2,
        "teacher__payload": "topk",
        "objective__support": "teacher_topk",
    },
    "TP2 PP2, longer prompts of the teacher": {
        "parallel__tensor": 2,
        "parallel__pipeline": 2,
        "teacher__prompt_template": "{prompt} {solution}",
        "teacher__max_prompt_tokens": 200,
    },
    "CP2, longer prompts of the teacher": {
        "parallel__context": 2,
        "teacher__prompt_template": "{prompt} {solution}",
        "teacher__max_prompt_tokens": 200,
    },
    "DP2, not distributed": {"parallel__data": 2, "optimizer__distributed": False},
}


def sent(planned: Config) -> tuple[int, dict[str, dict[tuple[str, str], float]]]:
    """The stage of this rank and, by phase, the bytes it sends by group and kind."""
    built = Built.of(planned)
    names = group_names(built.objective.groups)
    found = {}
    with recorded_traffic() as calls:
        update = built.scored()
    found["scoring"] = by_group(calls, names)
    built.student.start_step()
    with recorded_traffic() as calls:
        built.update(update)
        built.student.apply_gradients()
        if planned.teacher.ema is not None:
            teacher = built.objective.teacher
            assert isinstance(teacher, MegatronTeacher)
            WeightAverage(teacher.chunks, planned.teacher.ema).follow(built.student)
    found["training"] = by_group(calls, names)
    sizes = {
        phase: {key: volume.sent_bytes for key, volume in volumes.items() if volume.sent_bytes > SMALL}
        for phase, volumes in found.items()
    }
    return built.objective.groups.pp.rank(), sizes


def predicted(planned: Config, stage: int) -> dict[str, dict[tuple[str, str], float]]:
    """The same from the plan; the optimizer's phase belongs to training here."""
    found: dict[str, dict[tuple[str, str], float]] = {"scoring": {}, "training": {}}
    for one in stage_traffic(setting_of(planned), stage):
        phase = {"optimizer": "training"}.get(one.phase, one.phase)
        if phase in found:
            key = (one.group, one.kind)
            found[phase][key] = found[phase].get(key, 0.0) + one.sent
    return found


def check(gloo: GlooPools, planned: Config) -> None:
    """Every rank sends what its stage is predicted to send, within a hundredth; to experts within a tenth, since the
    routing of random models is not quite even."""
    # One group of ranks is named after the first that has them; an interleaved pipeline makes groups of its own.
    same = {"dp": "dp_cp", "tp_ep": "ep", "mp": "pp", "other": "pp"}
    for stage, phases in gloo(ranks_of(planned), sent, planned):
        expected = predicted(planned, stage)
        for phase, volumes in phases.items():
            merged: dict[tuple[str, str], float] = {}
            for (group, kind), size in volumes.items():
                key = (same.get(group, group), kind)
                merged[key] = merged.get(key, 0.0) + size
            large = {key: size for key, size in expected[phase].items() if size > SMALL}
            assert merged.keys() == large.keys(), (phase, stage)
            for key, size in large.items():
                tolerance = 0.1 if key == ("ep", "all_to_all") else 0.01
                assert merged[key] == pytest.approx(size, rel=tolerance), (phase, stage, key)


@pytest.mark.parametrize("name", RUNS)
def test_dense(gloo: GlooPools, tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    check(gloo, config(tmp_path_factory.getbasetemp() / "plan", **RUNS[name]))


@pytest.mark.parametrize("experts", [0, 8], ids=["dense", "experts"])
def test_a_teacher_that_follows_the_student(
    gloo: GlooPools, tmp_path_factory: pytest.TempPathFactory, experts: int
) -> None:
    sizes = Sizes(layers=2, hidden=128, vocab=1000, length=128, batch=4, experts=experts)
    folder = tmp_path_factory.getbasetemp() / "plan"
    own = config(folder, sizes).student.path
    changes = {"parallel__data": 2, "teacher__path": own, "teacher__ema": 0.9}
    check(gloo, config(folder, sizes, **changes))


def test_experts(gloo: GlooPools, tmp_path_factory: pytest.TempPathFactory) -> None:
    sizes = Sizes(layers=2, hidden=128, vocab=1000, length=128, batch=4, experts=8)
    folder = tmp_path_factory.getbasetemp() / "plan"
    check(gloo, config(folder, sizes, parallel__data=2, parallel__expert=2))
