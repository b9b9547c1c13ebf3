"""An interleaved pipeline where it needs care: its communication between two ranks, and more ranks than two."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opd.config.schema import OptimizerConfig
from megatron_opd.data.packing import pack
from megatron_opd.data.rollouts import Rollout
from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.teacher.teacher import Asked
from megatron_opd.training.update import Update, UpdateScale
from tests.tiny import VOCAB, save_tiny_model
from tests.training.tiny_run import assert_close, build_run

ONE = ParallelLayout()
TWO, FOUR = (ParallelLayout(pipeline=ranks, virtual_pipeline=2) for ranks in (2, 4))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """As deep as 4 ranks with 2 chunks each need."""
    folder = tmp_path_factory.mktemp("models")
    for tied in (True, False):
        save_tiny_model(folder / f"student-{tied}", seed=1, layers=8, hidden=32, tied=tied)
    save_tiny_model(folder / "teacher", seed=2, layers=8, hidden=32, tied=False)
    return folder


def _gradients_of_equal_lengths(layout: ParallelLayout, models: Path, **p2p: bool) -> dict[str, torch.Tensor]:
    """Main gradients of 4 microbatches of one shape, with `p2p` set in the student's megatron-core config."""
    run = build_run(layout, models, optimizer=OptimizerConfig(distributed=False))
    for name, value in p2p.items():
        setattr(run.student.chunks[0].config, name, value)
    rollouts = [
        Rollout(str(i), 0, [3 + i] * 4, [(i * k + 3) % VOCAB for k in range(9)], [-1.0] * 9, "length", 0)
        for i in range(8)
    ]
    packed = pack(rollouts, dp_size=1, token_budget=24, count_multiple=layout.microbatch_multiple)
    run.student.zero_grad()
    update = Update(packed[0], UpdateScale.of(packed), run.objective.teacher.score(Asked(packed[0])))
    run.objective.run(run.student.ddps, update)
    return run.gradients()


def test_two_ranks_need_the_communication_that_is_set(gloo, models):
    """With megatron-core's default, batches of sends and receives, nothing fails and the gradients are wrong."""
    expected = gloo(1, _gradients_of_equal_lengths, ONE, models)[0]
    default = {"overlap_p2p_comm": False, "batch_p2p_comm": True}
    found, mixed_up = (gloo(2, _gradients_of_equal_lengths, TWO, models, **p2p) for p2p in ({}, default))
    for name, gradient in expected.items():
        assert all((gradients[name] - gradient).abs().max() < 1e-5 for gradients in found), name
    assert any((mixed_up[0][name] - gradient).abs().max() > 0.1 for name, gradient in expected.items())


def _curve(layout: ParallelLayout, models: Any, tied: bool) -> list[dict[str, float]]:
    return build_run(layout, models, tied=tied).train(range(3))


@pytest.mark.full
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_four_ranks(gloo, models, tied):
    """Shapes differ from microbatch to microbatch and travel with them."""
    expected = gloo(1, _curve, ONE, models, tied)[0]
    for curve in gloo(4, _curve, FOUR, models, tied):
        assert_close(curve, expected, 1e-5)
