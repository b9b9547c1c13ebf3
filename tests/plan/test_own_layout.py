"""Plans of a teacher in a layout of its own against what routes, built models and packing come to."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_opd.config.layout_checks import alignment_of_run
from megatron_opd.config.schema import Config
from megatron_opd.data.packing import Microbatch, pack
from megatron_opd.models.gpt import build_gpt
from megatron_opd.parallel import cpu
from megatron_opd.parallel.groups import build_groups
from megatron_opd.plan.advice import advise
from megatron_opd.plan.handover import Handover, held_payloads
from megatron_opd.plan.hardware import load_hardware
from megatron_opd.plan.memory import stage_memory, teacher_memory
from megatron_opd.plan.plan import Plan
from megatron_opd.plan.setting import Setting
from megatron_opd.plan.traffic import payloads_received, payloads_sent
from megatron_opd.teacher.transport import Arrival, by_number, in_order, rows_of_share
from tests.gloo_pool import GlooPools
from tests.plan.runs import config, ranks_of, setting_of
from tools.bench.plan_check import random_sequences

SP = {"tensor": 2, "sequence_parallel": True}
OWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "DP2, own PP2": ({"data": 2}, {"separate": True, "pipeline": 2}),
    "TP2, own DP2": ({"tensor": 2}, {"separate": True, "data": 2}),
    "PP2, own TP4": ({"pipeline": 2}, {"separate": True, "tensor": 4}),
    "TP2 CP2, own DP1": ({"tensor": 2, "context": 2}, {"separate": True}),
    "DP1, own CP2": ({}, {"separate": True, "context": 2}),
    "DP4, TP2 SP": ({"data": 4}, SP),
    "TP2 PP2, CP2": ({"tensor": 2, "pipeline": 2}, {"context": 2}),
    "CP2, TP2 SP": ({"context": 2}, SP),
}


def relaid(folder: Path, name: str, **more: Any) -> Config:
    student, teacher = OWN[name]
    sizes = {f"parallel__{key}": value for key, value in student.items()}
    return config(folder, teacher__parallel=teacher, rollout__prompts_per_step=8, **sizes, **more)


def packed(setting: Setting) -> list[Microbatch]:
    """The whole microbatches of a step whose sequences are as long as the configuration allows, by number."""
    sequences = random_sequences(setting, setting.vocab)
    return in_order(
        pack(
            sequences,
            dp_size=setting.layout.data,
            token_budget=setting.config.training.microbatch_tokens,
            alignment=alignment_of_run(setting.config),
            count_multiple=setting.layout.microbatch_multiple,
        )
    )


@pytest.mark.parametrize("name", OWN)
def test_payloads_are_those_of_the_routes(tmp_path: Path, name: str) -> None:
    """Bytes of every sender and receiver, passes of the teacher's replicas, and the padding that both layouts need."""
    setting = setting_of(relaid(tmp_path, name))
    whole, layouts, form = packed(setting), setting.layouts, setting.payload
    assert form is not None
    lengths = {int(length) for each in whole for length in each.cu_seqlens.diff()}
    alignment = math.lcm(setting.layout.segment_alignment, layouts.teacher.segment_alignment)
    assert lengths == {setting.workload.pack.longest} and setting.workload.pack.longest % alignment == 0
    passes = {len(layouts.work(whole, replica)) for replica in range(layouts.teacher.data)}
    assert passes == {setting.teaching.workload.microbatches}
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for route in layouts.routes(whole):
        if route.sender != route.receiver:
            size = len(route.taken_M) * form.bytes_per_position
            sent[route.sender] += size
            received[route.receiver] += size
    uneven = 0.02 if max(setting.layout.context, layouts.teacher.context) > 1 else 1e-9
    assert payloads_sent(setting) == pytest.approx(dict(sent), rel=uneven)
    assert payloads_received(setting) == pytest.approx(dict(received), rel=uneven)


@pytest.mark.parametrize("name", OWN)
def test_a_payload_under_way(tmp_path: Path, name: str) -> None:
    """Bytes of what a receiver makes room for, whole and in parts."""
    setting = setting_of(relaid(tmp_path, name))
    whole, form, share = packed(setting), setting.payload, Handover.of(setting.layouts)
    assert form is not None
    context = setting.layout.context
    for (number, receiver), routes in by_receiver(setting, whole).items():
        rows = len(rows_of_share(whole[number], receiver // setting.layout.tensor % context, context))
        arrival = Arrival(routes, rows, form, None, torch.device("cpu"))  # type: ignore[arg-type]
        rooms = [room for _, each in arrival._rooms for room in each]
        held = {each.data_ptr(): each.nbytes for each in [*arrival._tensors, *rooms]}
        tokens = int(whole[number].mask_T.sum())
        assert sum(held.values()) == pytest.approx(
            share.arriving * tokens * form.bytes_per_position, rel=0.02
        )
    if setting.separate:
        (one,) = {int(each.mask_T.sum()) for each in whole}
        windows = held_payloads(setting, setting.last_stage, None, scoring=False)
        expected = (2 * share.arriving + share.read) * one * form.bytes_per_position
        assert windows == pytest.approx(expected, rel=0.02)


def by_receiver(setting: Setting, whole: list[Microbatch]) -> dict[tuple[int, int], list[Any]]:
    """The routes of each payload that a rank reads."""
    found: dict[tuple[int, int], list[Any]] = {}
    for number, routes in by_number(setting.layouts.routes(whole)).items():
        for route in routes:
            found.setdefault((number, route.receiver), []).append(route)
    return found


def built_bytes(planned: Config) -> tuple[int, int]:
    """(the teacher's stage, bytes of its weights) of this rank, -1 and 0 where it has none. Collective over WORLD."""
    cpu.install()
    setting = Setting.of(planned, dist.get_world_size(), "cpu")
    layouts = setting.layouts
    groups = build_groups(layouts.teacher, layouts.first)
    if dist.get_rank() < layouts.first:
        return -1, 0
    assert setting.teacher is not None
    padded = setting.teacher.padded_vocab_size(layouts.teacher.tensor)
    chunks = build_gpt(
        setting.teacher, layouts.teacher, groups, precision=planned.precision, padded_vocab_size=padded
    )
    return groups.pp.rank(), sum(p.nbytes for chunk in chunks for p in chunk.parameters())


@pytest.mark.parametrize("name", ["DP2, own PP2", "TP2, own DP2", "CP2, TP2 SP"])
def test_weights_of_the_teachers_ranks(
    gloo: GlooPools, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    planned = relaid(tmp_path_factory.getbasetemp() / "plan", name)
    setting = setting_of(planned)
    for stage, size in gloo(ranks_of(planned), built_bytes, planned):
        if stage >= 0:
            memory = (teacher_memory if setting.separate else stage_memory)(setting, stage)
            assert memory.always["teacher weights"] == size


def test_where_the_teacher_is(tmp_path: Path) -> None:
    """On ranks of its own: beside the student are none of its weights but the head, which `sampled` does not need."""
    plan = Plan.of(relaid(tmp_path, "PP2, own TP4"), 6, load_hardware("h100-80gb"))
    first, last = plan.memory
    setting, teacher = plan.setting, plan.setting.teacher
    assert teacher is not None
    assert "teacher weights" not in last.always and "teacher head" not in first.always
    assert last.always["teacher head"] == 2 * setting.vocab_shard * teacher.hidden_size
    (theirs,) = plan.teacher_memory
    assert set(theirs.always) == {"teacher weights"} and theirs.phase == "scoring"
    assert [str(last), str(theirs)] == ["stage 1", "teacher's stage 0"] and not theirs.phases["training"]
    sampled = relaid(
        tmp_path, "PP2, own TP4", teacher__payload="sampled", objective__divergence="policy_gradient"
    )
    assert "teacher head" not in stage_memory(setting_of(sampled), 1).always
    here = stage_memory(setting_of(relaid(tmp_path, "CP2, TP2 SP")), 0)
    assert {"teacher weights", "teacher head", "student weights"} <= set(here.always)


def test_an_offloaded_teacher_leaves_with_its_head(tmp_path: Path) -> None:
    """In another layout: the objective projects with the student's copy of the head, which stays."""
    kept, gone = (
        Plan.of(relaid(tmp_path, "CP2, TP2 SP", **more), 2, load_hardware("h100-80gb"))
        for more in ({}, {"teacher__offload": True})
    )
    before, after = kept.memory[0].always, gone.memory[0].always
    lent = gone.memory[0].phases["scoring"]["offloaded teacher weights"]
    assert after["teacher weights"] == 0 and lent == before["teacher weights"]
    assert after["teacher head"] == before["teacher head"] > 0
    assert gone.spans["scoring"].total > kept.spans["scoring"].total


def separate(folder: Path, data: int, **more: Any) -> Plan:
    """With a teacher of as many replicas on ranks of its own, and many microbatches."""
    own: dict[str, Any] = {
        "teacher__parallel": {"separate": True, "data": data},
        "training__microbatch_tokens": 256,
    }
    planned = config(folder, rollout__prompts_per_step=64, **own, **more)
    return Plan.of(planned, ranks_of(planned), load_hardware("h100-80gb"))


def test_seconds_of_a_separate_teacher_are_hidden_or_waited_for(tmp_path: Path) -> None:
    one, four = separate(tmp_path, 1), separate(tmp_path, 4)
    for plan in (one, four):
        assert plan.teacher_span is not None and plan.hidden_seconds > 0
        waited = plan.spans["waiting"].total
        assert plan.hidden_seconds + waited == pytest.approx(plan.teacher_span.total)
        first = plan.teacher_span.total / plan.setting.workload.microbatches
        together = waited + plan.spans["training"].total
        slower = max(plan.teacher_span.total, plan.spans["training"].total)
        assert slower <= together <= slower + 2 * max(first, slower / plan.setting.workload.microbatches)
    assert four.spans["waiting"].total < one.spans["waiting"].total


def test_in_another_layout_on_the_same_ranks_its_seconds_are_scoring(tmp_path: Path) -> None:
    planned = relaid(tmp_path, "DP4, TP2 SP")
    plan = Plan.of(planned, 4, load_hardware("h100-80gb"))
    assert plan.teacher_span is not None and "waiting" not in plan.spans
    assert plan.spans["scoring"].total == pytest.approx(plan.teacher_span.total)
    assert {one.group for one in plan.teacher_traffic[0]} == {"tp", "messages"}


def test_advice_is_what_a_run_accepts(tmp_path: Path) -> None:
    """On as many processes, the teacher's own among them."""
    found = advise(separate(tmp_path, 4, training__recompute="full"))
    assert found and all(one.plan.setting.processes == 5 for one in found)
