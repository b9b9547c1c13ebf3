"""What the plan says of a teacher that follows the student, or that reads longer prompts than it."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.plan.hardware import load_hardware
from megatron_opd.plan.plan import Plan
from megatron_opd.plan.table import as_json
from tests.plan.runs import config


def plan_of(folder: Path, processes: int = 1, **changes: Any) -> Plan:
    return Plan.of(config(folder, **changes), processes, load_hardware("h100-80gb"))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_average_is_four_bytes_a_weight_on_every_process(tmp_path: Path, precision: str) -> None:
    own = config(tmp_path).student.path
    changes = {"precision": precision, "parallel__data": 2, "teacher__path": own}
    fixed, moving = (plan_of(tmp_path, 2, **changes, **ema) for ema in ({}, {"teacher__ema": 0.9}))
    always = moving.memory[0].always
    weights = always["teacher weights"] // moving.setting.bytes_per_value
    assert {k: v for k, v in always.items() if k not in fixed.memory[0].always} == {
        "teacher average": 4 * weights
    }
    assert moving.spans["optimizer"].total > fixed.spans["optimizer"].total
    sums = [one for one in moving.traffic[0] if one not in fixed.traffic[0]]
    assert [(one.kind, one.nbytes) for one in sums] == (
        [("all_reduce", 4 * weights)] if precision == "bf16" else []
    )


def test_longer_prompts_of_the_teacher_take_its_pass_longer_and_its_pass_alone(tmp_path: Path) -> None:
    template: dict[str, Any] = {
        "teacher__prompt_template": "{prompt} {solution}",
        "training__microbatch_tokens": 1024,
    }
    same, longer = (
        plan_of(tmp_path, **template, **changes) for changes in ({}, {"teacher__max_prompt_tokens": 250})
    )
    work = longer.setting.workload
    assert work.teacher_pack.tokens * 255 == work.pack.tokens * (250 + 127)
    assert (work.pack.longest, work.teacher_pack.longest) == (255, 377)
    assert same.setting.workload.teacher_pack == same.setting.workload.pack
    assert work.microbatches > same.setting.workload.microbatches
    growth = longer.flops[0]["teacher forward"] / same.flops[0]["teacher forward"]
    assert 377 / 255 < growth < 2 * 377 / 255, "attention grows faster than the rest"
    for name in ("student forward", "heads and objective"):
        assert longer.flops[0][name] == pytest.approx(same.flops[0][name])
    one, other = (plan.memory[0].phases["scoring"]["working set"] for plan in (same, longer))
    assert other >= one
    assert longer.spans["scoring"].total > same.spans["scoring"].total
    written = json.loads(json.dumps(as_json(longer, [])))["workload"]
    assert (written["teacher_pack"]["longest"], written["pack"]["longest"]) == (377, 255)
