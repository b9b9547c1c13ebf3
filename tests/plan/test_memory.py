"""The predicted memory of a training update against what it really takes, rank by rank."""

from pathlib import Path
from typing import Any

import pytest

from megatron_opd.plan.memory import in_flight, stage_memory
from tests.gloo_pool import GlooPools
from tests.plan.runs import config, ranks_of, setting_of
from tools.bench.plan_check import Measured, Sizes, measure, training_parts

SP = {"parallel__tensor": 2, "parallel__sequence_parallel": True}
RUNS: dict[str, dict[str, Any]] = {
    "DP1": {},
    "recompute full": {"training__recompute": "full"},
    "TP2": {"parallel__tensor": 2, "precision": "fp32", "training__recompute": "selective"},
    "TP2 SP": SP,
    "PP2": {"parallel__pipeline": 2, "training__microbatch_tokens": 256},
    "CP2": {"parallel__context": 2},
    "PP2 VPP2": {
        "parallel__pipeline": 2,
        "parallel__virtual_pipeline": 2,
        "training__microbatch_tokens": 256,
    },
    "DP2": {"parallel__data": 2, "objective__head_chunk": 64},
    "logits": {"teacher__payload": "logits"},
    "TP2, top-K": {
        "parallel__tensor": 2,
        "teacher__payload": "topk",
        "objective__support": "teacher_topk",
        "objective__head_chunk": 64,
    },
    "DP2, not distributed": {"parallel__data": 2, "optimizer__distributed": False, "optimizer__name": "sgd"},
}


@pytest.mark.parametrize("name", RUNS)
def test_training(gloo: GlooPools, tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """Weights, gradients, state, teacher and payload to the byte; all together within a tenth."""
    planned = config(tmp_path_factory.getbasetemp() / "plan", **RUNS[name])
    ranks: list[Measured] = gloo(ranks_of(planned), measure, planned)
    setting = setting_of(planned)
    for stage in range(planned.parallel.pipeline):
        predicted = training_parts(stage_memory(setting, stage))
        fullest = max((one for one in ranks if one.stage == stage), key=lambda one: one.total)
        exact = ["weights", "gradients", "teacher"]
        if planned.parallel.context == 1:  # whose zigzag shares have a loss token more or less
            exact.append("payload")
        assert {part: predicted[part] for part in exact} == {part: getattr(fullest, part) for part in exact}
        assert predicted["state"] == max(one.state for one in ranks if one.stage == stage)
        assert sum(predicted.values()) == pytest.approx(fullest.total, rel=0.1)


@pytest.mark.parametrize("data", [1, 2])
def test_training_with_experts(gloo: GlooPools, tmp_path_factory: pytest.TempPathFactory, data: int) -> None:
    sizes = Sizes(layers=2, hidden=128, vocab=1000, length=128, batch=4, experts=8)
    folder = tmp_path_factory.getbasetemp() / "plan"
    planned = config(folder, sizes, parallel__data=data, parallel__expert=data)
    ranks: list[Measured] = gloo(data, measure, planned)
    predicted = training_parts(stage_memory(setting_of(planned), 0))
    for rank in ranks:
        for part in ("weights", "gradients", "teacher", "payload"):
            assert predicted[part] == getattr(rank, part), part
        assert rank.state <= predicted["state"] <= 1.01 * max(one.state for one in ranks)
        assert sum(predicted.values()) == pytest.approx(rank.total, rel=0.1)


def test_microbatches_in_flight(tmp_path: Path) -> None:
    """1F1B: as many as stages are left. Interleaved: what the first stage starts before its first backward pass."""
    options: dict[str, Any] = {"rollout__prompts_per_step": 32, "rollout__max_new_tokens": 128}
    plain = setting_of(config(tmp_path, parallel__pipeline=4, **options))
    assert [in_flight(plain, stage) for stage in range(4)] == [4, 3, 2, 1]
    few = setting_of(
        config(tmp_path, parallel__pipeline=4, rollout__prompts_per_step=4, rollout__max_new_tokens=128)
    )
    assert [in_flight(few, stage) for stage in range(4)] == [2, 2, 2, 1]
    woven = setting_of(config(tmp_path, parallel__pipeline=2, parallel__virtual_pipeline=2, **options))
    assert [in_flight(woven, stage) for stage in range(2)] == [2.5, 1.5]
