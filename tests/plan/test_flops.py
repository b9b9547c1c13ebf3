"""Predicted operations against torch's own count of what a step computes."""

from typing import Any

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_opd.config.schema import Config
from megatron_opd.plan.flops import layer_attention, stage_flops
from tests.gloo_pool import GlooPools
from tests.plan.runs import config, setting_of
from tools.bench.plan_check import Built, Sizes

RUNS: dict[str, dict[str, Any]] = {
    "plain": {"precision": "fp32"},
    "recompute": {"training__recompute": "full"},
    "payload": {
        "precision": "fp32",
        "teacher__payload": "sampled",
        "objective__divergence": "policy_gradient",
    },
    "chunks": {"objective__head_chunk": 100},  # in bf16: torch does not count the addmm_ of float32
}


def counted(planned: Config) -> tuple[int, int]:
    """Operations of the teacher's pass and of the update, by torch; attention as plain products, which it counts."""
    built = Built.of(planned)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as scoring:
        update = built.scored()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as training:
        built.update(update)
    return scoring.get_total_flops(), training.get_total_flops()


@pytest.mark.parametrize("experts", [0, 8])
@pytest.mark.parametrize("name", RUNS)
def test_one_process(
    gloo: GlooPools, tmp_path_factory: pytest.TempPathFactory, name: str, experts: int
) -> None:
    sizes = Sizes(layers=2, hidden=128, vocab=2000, length=128, batch=4, experts=experts)
    planned = config(tmp_path_factory.getbasetemp() / "plan", sizes, **RUNS[name])
    scoring, training = gloo(1, counted, planned)[0]
    setting = setting_of(planned)
    assert setting.teacher is not None
    flops = stage_flops(setting, 0)
    work = setting.workload
    # There every position meets the whole segment, forward and backward, and nothing is computed again for the latter.
    unseen = work.microbatches * sizes.layers * layer_attention(setting, setting.teacher, work.pack)
    assert flops["teacher forward"] + unseen == pytest.approx(scoring, rel=0.02)
    passes = 2 * 3 - 3.5 + (planned.training.recompute == "full")
    unseen = work.microbatches * sizes.layers * layer_attention(setting, setting.student, work.pack) * passes
    parts = ("student forward", "student backward", "recomputation", "heads and objective")
    assert sum(flops.get(part, 0.0) for part in parts) + unseen == pytest.approx(training, rel=0.02)
