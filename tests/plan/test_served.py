"""Plans of runs with servers: what they draw and score takes nothing of the training processes."""

from pathlib import Path
from typing import Any

import pytest

from megatron_opd.plan.advice import advise
from megatron_opd.plan.hardware import load_hardware
from megatron_opd.plan.memory import stage_memory
from megatron_opd.plan.plan import Plan
from megatron_opd.plan.setting import Setting
from megatron_opd.plan.traffic import stage_traffic
from tests.plan.runs import config, ranks_of, setting_of

SERVED: dict[str, Any] = {"teacher__engine": "sglang", "teacher__sglang": {"urls": ["http://127.0.0.1:1"]}}
DRAWN: dict[str, Any] = {"rollout__engine": "sglang", "rollout__sglang": {"urls": ["http://127.0.0.1:1"]}}
LSM: dict[str, Any] = {"objective__support": "teacher_topk", "objective__k": 8}
OWN_IDS: dict[str, Any] = {"objective__support": "student_topk", "objective__k": 8}
OPD: dict[str, Any] = {"objective__divergence": "policy_gradient"}


@pytest.mark.parametrize(("objective", "ids"), [(OPD, 0), (LSM, 8)])
def test_a_served_teacher_leaves_its_payload(tmp_path: Path, objective: dict[str, Any], ids: int) -> None:
    own, served = (setting_of(config(tmp_path, **objective, **other)) for other in ({}, SERVED))
    here, there = stage_memory(own, 0), stage_memory(served, 0)
    assert set(here.always) - set(there.always) == {"teacher weights"}
    tokens = served.workload.sequences * served.workload.response
    assert there.phases["training"]["teacher payload"] == tokens * (4 + 12 * ids)
    for phase in ("scoring", "training"):
        assert sum(there.phases[phase].values()) < sum(here.phases[phase].values())
    assert there.phases["rollout"] == here.phases["rollout"]
    plans = [Plan.of(each.config, 1, load_hardware("h100-80gb")) for each in (own, served)]
    kept, gone = plans[1].flops[0], plans[0].flops[0].keys() - plans[1].flops[0].keys()
    assert gone == {"teacher forward"} and kept["student forward"] == plans[0].flops[0]["student forward"]
    assert kept["heads and objective"] < plans[0].flops[0]["heads and objective"]
    assert plans[1].seconds < plans[0].seconds and plans[1].spans["scoring"].total == 0


def test_ids_of_the_student_are_found_by_a_pass_of_it(tmp_path: Path) -> None:
    planned = config(tmp_path, **OWN_IDS, **SERVED)
    flops = Plan.of(planned, 1, load_hardware("h100-80gb")).flops[0]
    assert flops["other scoring"] > flops["student forward"], "and its head"
    assert stage_memory(setting_of(planned), 0).phases["scoring"]["hidden states"] > 0


def scoring(setting: Setting) -> dict[tuple[str, str], float]:
    """Bytes that a rank sends, by group and kind."""
    calls = [one for one in stage_traffic(setting, 0) if one.phase == "scoring"]
    return {(one.group, one.kind): one.calls * one.nbytes for one in calls}


def test_the_payload_goes_to_the_ranks_of_a_replica(tmp_path: Path) -> None:
    """4 + 8 K bytes a response token; before them, over CP, what to ask for."""
    served = setting_of(config(tmp_path, parallel__tensor=2, **LSM, **SERVED))
    tokens = served.workload.sequences * served.workload.response
    assert scoring(served) == {("tp", "broadcast"): tokens * (4 + 8 * 8)}
    served = setting_of(config(tmp_path, parallel__context=2, **OPD, **SERVED))
    positions = served.workload.pack.tokens * served.workload.microbatches
    assert scoring(served) == {("cp", "broadcast"): tokens * 4, ("cp", "all_gather"): positions * 24}


def test_served_rollouts_take_nothing_here(tmp_path: Path) -> None:
    planned = config(tmp_path, parallel__tensor=2, **DRAWN)
    plan = Plan.of(planned, ranks_of(planned), load_hardware("h100-80gb"))
    assert set(plan.spans) == {"scoring", "training", "optimizer"}
    assert not any(name.startswith("rollout") for name in plan.flops[0])
    assert {one.phase for one in plan.traffic[0]} == {"scoring", "training", "optimizer"}
    assert plan.memory[0].phases["rollout"] == {} and plan.memory[0].phase == "training"


def test_advice_for_served_runs_is_what_a_run_accepts(tmp_path: Path) -> None:
    planned = config(tmp_path, training__recompute="full", **LSM, **SERVED, **DRAWN)
    found = advise(Plan.of(planned, 1, load_hardware("h100-80gb")))
    assert found and not any(
        "rollout.max_batch" in one.changes or "teacher.offload" in one.changes for one in found
    )
