"""A student with experts resumes with them spread differently."""

from pathlib import Path
from typing import Any

import pytest

from megatron_opd.checkpoint.published import Retention, published
from megatron_opd.checkpoint.store import CheckpointStore
from megatron_opd.config.schema import OptimizerConfig
from megatron_opd.parallel.groups import ParallelLayout
from tests.checkpoint.models import write_hf
from tests.tiny import VOCAB
from tests.training.tiny_run import SCHEDULED, assert_close, build_run

ONE = ParallelLayout()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 128}
    write_hf(folder / "student", "qwen3_moe", tied=True, num_hidden_layers=2, **sizes)
    write_hf(folder / "teacher", "qwen3_moe", tied=False, norm_topk_prob=False, **sizes)
    return folder


def _save_after_2(
    layout: ParallelLayout, models: Path, folder: Path, optimizer: OptimizerConfig
) -> list[dict[str, float]]:
    run = build_run(layout, models, student_name="student", optimizer=optimizer)
    run.train(range(2))
    store = CheckpointStore(folder, Retention(1), run.groups, models / "student", {})
    store.save(2, run.student.chunks, run.student.optimizer, {})
    store.publish()
    return run.train(range(2, 4))


def _resume(
    layout: ParallelLayout, models: Path, folder: Path, optimizer: OptimizerConfig
) -> list[dict[str, float]]:
    run = build_run(layout, models, student_name="student", optimizer=optimizer)
    store = CheckpointStore(folder, Retention(1), run.groups, models / "student", {})
    store.load(published(folder)[-1], run.student.chunks, run.student.optimizer)
    run.student.continue_after(2)
    return run.train(range(2, 4))


EP2, EP4 = ParallelLayout(data=2, expert=2), ParallelLayout(data=4, expert=4)
RESUMED = {
    EP2: [EP2, EP4, ONE, ParallelLayout(data=2), ParallelLayout(tensor=2, sequence_parallel=True, expert=2)],
    ONE: [EP2, ParallelLayout(pipeline=2, data=2, expert=2)],
}


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "plain"])
@pytest.mark.parametrize("saved", RESUMED, ids=str)
def test_resumes_with_experts_spread_differently(gloo, models, tmp_path, saved, distributed):
    """Of every layout megatron-core makes two optimizers, since `_mark_shards` tells experts from the rest in each."""
    optimizer = SCHEDULED.model_copy(update={"distributed": distributed})
    expected = gloo(saved.world_size, _save_after_2, saved, models, tmp_path, optimizer)[0]
    for layout in RESUMED[saved]:
        curve = gloo(layout.world_size, _resume, layout, models, tmp_path, optimizer)[0]
        assert_close(curve, expected, 1e-5)
        assert layout != saved or curve == expected, "bit for bit"
