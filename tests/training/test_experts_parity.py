"""A student with experts: its balancing loss, and resuming with the experts spread differently."""

from pathlib import Path
from typing import Any

import pytest

from megatron_opd.checkpoint.store import CheckpointStore, published
from megatron_opd.config.schema import OptimizerConfig
from megatron_opd.parallel.groups import ParallelLayout
from tests.checkpoint.models import write_hf
from tests.tiny import VOCAB
from tests.training.tiny_run import SCHEDULED, assert_close, build_run

ONE = ParallelLayout()

DISTRIBUTED = SCHEDULED.model_copy(update={"distributed": True})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 128}
    balanced: dict[str, Any] = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    write_hf(folder / "student", "qwen3_moe", tied=True, num_hidden_layers=2, **sizes)
    write_hf(folder / "balanced", "qwen3_moe", tied=True, num_hidden_layers=2, **sizes, **balanced)
    write_hf(folder / "teacher", "qwen3_moe", tied=False, norm_topk_prob=False, **sizes)
    return folder


def _gradients(
    layout: ParallelLayout, models: Any, student: str = "student", **options: Any
) -> dict[str, Any]:
    whole = OptimizerConfig(distributed=False)  # the distributed optimizer reduces a shard of them only
    run = build_run(layout, models, student_name=student, optimizer=whole, **options)
    run.forward_backward(0)
    return run.gradients()


@pytest.fixture(scope="module")
def expected_gradients(gloo, models):
    return gloo(1, _gradients, ONE, models)[0]


def test_balancing_loss_counts_where_the_model_asks_for_it(gloo, models, expected_gradients):
    balanced = gloo(1, _gradients, ONE, models, "balanced")[0]
    router = "model.layers.1.mlp.gate.weight"
    assert (balanced[router] - expected_gradients[router]).abs().max() > 1e-3
    for gradients in gloo(2, _gradients, ParallelLayout(pipeline=2), models, "balanced"):
        for name, gradient in gradients.items():
            assert (gradient - balanced[name]).abs().max() < 1e-5, name


def _save_after_2(layout: ParallelLayout, models: Path, folder: Path) -> list[dict[str, float]]:
    run = build_run(layout, models, student_name="student")
    run.train(range(2))
    store = CheckpointStore(folder, 1, run.groups, models / "student", {})
    store.save(2, run.student.chunks, run.student.optimizer, {})
    return run.train(range(2, 4))


def _resume(layout: ParallelLayout, models: Path, folder: Path) -> list[dict[str, float]]:
    run = build_run(layout, models, student_name="student", optimizer=DISTRIBUTED)
    store = CheckpointStore(folder, 1, run.groups, models / "student", {})
    store.load(published(folder)[-1], run.student.chunks, run.student.optimizer)
    run.student.continue_after(2)
    return run.train(range(2, 4))


def test_resumes_with_experts_spread_differently(gloo, models, tmp_path):
    expected = gloo(2, _save_after_2, ParallelLayout(data=2, expert=2), models, tmp_path)[0]
    for layout in (ONE, ParallelLayout(tensor=2, sequence_parallel=True, expert=2)):
        assert_close(gloo(layout.world_size, _resume, layout, models, tmp_path)[0], expected, 1e-5)
