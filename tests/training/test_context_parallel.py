"""Context parallelism in a training step: every rank holds its zigzag share of each sequence, and nothing changes."""

from pathlib import Path
from typing import Any

import pytest

from megatron_opd.checkpoint.published import Retention, published
from megatron_opd.checkpoint.store import CheckpointStore
from megatron_opd.config.schema import OptimizerConfig
from megatron_opd.data.rollouts import Rollout
from megatron_opd.parallel.groups import ParallelLayout
from tests.training.tiny_run import SCHEDULED, assert_close, build_run

ONE = ParallelLayout()
CP2 = ParallelLayout(context=2)


ONE_TOKEN = [Rollout("0", 0, [7, 20, 33, 46, 59, 72, 85], [98], [-1.0], "length", 0)]


def _gradients(
    layout: ParallelLayout, models: Path, rollouts: list[Rollout], **options: Any
) -> tuple[Any, Any]:
    """Sums of the update (loss, IW weights, log-gaps ...) and main gradients."""
    whole = OptimizerConfig(distributed=False)  # the distributed optimizer reduces a shard of them only
    run = build_run(layout, models, optimizer=whole, **options)
    return run.accumulate(run.pack(rollouts)), run.gradients()


def _assert_same(got: tuple[Any, Any], want: tuple[Any, Any]) -> None:
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    assert got[1].keys() == want[1].keys()
    for name, gradient in got[1].items():
        assert (gradient - want[1][name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("head_chunk", [None, 3])
@pytest.mark.parametrize("layout", [CP2, ParallelLayout(context=2, pipeline=2)], ids=str)
def test_a_rank_without_any_response_token(gloo, models, layout, head_chunk):
    """The only loss position is the first rank's; the other takes part in all collectives."""
    want = gloo(1, _gradients, ONE, models, ONE_TOKEN)[0]
    for got in gloo(layout.world_size, _gradients, layout, models, ONE_TOKEN, head_chunk=head_chunk):
        _assert_same(got, want)


def _save_after_2(layout: ParallelLayout, models: Path, folder: Path) -> list[dict[str, float]]:
    run = build_run(layout, models)
    run.train(range(2))
    store = CheckpointStore(folder, Retention(1), run.groups, models / "student-True", {})
    store.save(2, run.student.chunks, run.student.optimizer, {})
    store.publish()
    return run.train(range(2, 4))


def _resume(layout: ParallelLayout, models: Path, folder: Path) -> list[dict[str, float]]:
    distributed = SCHEDULED.model_copy(update={"distributed": True})
    run = build_run(layout, models, optimizer=distributed)
    store = CheckpointStore(folder, Retention(1), run.groups, models / "student-True", {})
    store.load(published(folder)[-1], run.student.chunks, run.student.optimizer)
    run.student.continue_after(2)
    return run.train(range(2, 4))


def test_resumes_with_another_number_of_context_parallel_ranks(gloo, models, tmp_path):
    expected = gloo(2, _save_after_2, CP2, models, tmp_path)[0]
    for layout in (CP2, ONE, ParallelLayout(context=2, data=2)):
        assert_close(gloo(layout.world_size, _resume, layout, models, tmp_path)[0], expected, 1e-5)
