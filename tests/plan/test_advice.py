"""Advice is tried before it is given: what it promises is what the plan of the changed configuration says."""

from pathlib import Path

import pytest

from megatron_opd.config.load import load_config
from megatron_opd.config.schema import Config
from megatron_opd.plan.advice import advise, changed, verdict
from megatron_opd.plan.hardware import Hardware, load_hardware
from megatron_opd.plan.plan import Plan

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def shipped(*overrides: str) -> Config:
    return load_config(ROOT / "examples/plans/qwen3-30b-a3b-to-4b.yaml", list(overrides))


def planned(*overrides: str, hardware: Hardware | None = None) -> Plan:
    return Plan.of(shipped(*overrides), 32, hardware or load_hardware("h100-80gb"))


def test_what_does_not_fit_is_made_to_fit() -> None:
    plan = planned("rollout.max_batch=null", "objective.head_chunk=null", "parallel.expert=1")
    assert not plan.fits
    line = verdict(plan)[0]
    assert line.startswith("memory: DOES NOT FIT") and "key-value cache" in line
    first = advise(plan)[0]
    assert first.plan.fits and len(first.changes) >= 2, "no single change is enough here"
    again = Plan.of(changed(plan.setting.config, first.changes), 32, plan.hardware)
    assert again.fullest.total == first.plan.fullest.total and again.seconds == first.plan.seconds


def test_one_change_is_enough_where_it_is() -> None:
    """The shortest step first; among them a smaller cache, which is what is too much."""
    plan = planned("rollout.max_batch=null")
    assert not plan.fits
    found = advise(plan)
    assert all(len([key for key in one.changes if not key.startswith("parallel.")]) <= 1 for one in found)
    assert all(one.plan.fits for one in found)
    assert [one.plan.seconds for one in found] == sorted(one.plan.seconds for one in found)


def test_what_fits_gets_only_what_is_faster() -> None:
    plan = planned("training.recompute=full")
    assert plan.fits
    found = advise(plan)
    assert {"training.recompute": "none"} in [one.changes for one in found]
    assert all(one.plan.fits and one.plan.seconds < plan.seconds for one in found)


def test_hopeless_says_how_far_it_gets() -> None:
    tiny = load_hardware("h100-80gb").model_copy(update={"memory": 6.5})
    plan = planned(hardware=tiny)
    found = advise(plan)
    assert len(found) == 1 and not found[0].plan.fits and found[0].plan.fullest.total < plan.fullest.total
    assert "GiB" in str(found[0])
