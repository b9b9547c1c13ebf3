"""A gradient that is not finite skips the update on all ranks together and leaves the weights as they
were."""

import math
from typing import Any

import pytest
import torch

from megatron_opd.parallel.groups import ParallelLayout
from tests.training.tiny_run import build_run, save_pair

LAYOUTS = [ParallelLayout(), ParallelLayout(data=2), ParallelLayout(tensor=2), ParallelLayout(pipeline=2)]


def _poisoned_step(layout: ParallelLayout, models: Any, precision: str) -> tuple[float, bool, bool, float]:
    run = build_run(layout, models, precision=precision)
    before = [parameter.detach().clone() for parameter in run.student.chunks[0].parameters()]
    run.forward_backward(0)
    if torch.distributed.get_rank() == layout.world_size - 1:  # only one rank sees it locally
        next(run.student.chunks[0].parameters()).main_grad.view(-1)[0] = torch.nan
    norm, applied = run.student.apply_gradients()
    after = list(run.student.chunks[0].parameters())
    same = all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    run.forward_backward(0)
    return norm, applied, same, run.student.apply_gradients()[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_all_ranks_skip_together_and_go_on(gloo, tmp_path, layout, precision):
    save_pair(tmp_path)
    for norm, applied, same, next_norm in gloo(
        layout.world_size, _poisoned_step, layout, tmp_path, precision
    ):
        assert not math.isfinite(norm)
        assert not applied
        assert same, "the weights moved"
        assert math.isfinite(next_norm), "the next update is sound"
