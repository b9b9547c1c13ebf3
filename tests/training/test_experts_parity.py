"""A student with experts: the same gradients, norms and training curve however experts and tokens are spread."""

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

PAIRWISE = [
    ParallelLayout(data=2, expert=2),
    ParallelLayout(
        tensor=2, sequence_parallel=True
    ),  # every expert on both ranks, each sees half of the tokens
    ParallelLayout(tensor=2, sequence_parallel=True, expert=2),
    ParallelLayout(pipeline=2, data=2, expert=2),
    ParallelLayout(tensor=2, sequence_parallel=True, data=2, expert=2),
]
REST = [
    ParallelLayout(data=2),
    ParallelLayout(tensor=2, sequence_parallel=True, data=2, expert=4),
    ParallelLayout(tensor=2, sequence_parallel=True, pipeline=2, expert=2),
]
LAYOUTS = [*PAIRWISE, *(pytest.param(layout, marks=pytest.mark.full) for layout in REST)]
STEPS = range(3)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 128}
    write_hf(folder / "student", "qwen3_moe", tied=True, num_hidden_layers=2, **sizes)
    write_hf(folder / "teacher", "qwen3_moe", tied=False, norm_topk_prob=False, **sizes)
    return folder


def _gradients(layout: ParallelLayout, models: Any) -> dict[str, Any]:
    whole = OptimizerConfig(distributed=False)  # the distributed optimizer reduces a shard of them only
    run = build_run(layout, models, student_name="student", optimizer=whole)
    run.forward_backward(0)
    return run.gradients()


def _curve(layout: ParallelLayout, models: Any, **options: Any) -> list[dict[str, float]]:
    return build_run(layout, models, student_name="student", **options).train(STEPS)


@pytest.fixture(scope="module")
def expected_gradients(gloo, models):
    return gloo(1, _gradients, ONE, models)[0]


@pytest.fixture(scope="module")
def expected_curve(gloo, models):
    return gloo(1, _curve, ONE, models)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_main_gradients(gloo, models, expected_gradients, layout):
    for gradients in gloo(layout.world_size, _gradients, layout, models):
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            assert (gradient - expected_gradients[name]).abs().max() < 1e-5, name
    parts = ("mlp.gate.", "experts.3.gate_proj", "experts.0.down_proj", "q_norm")
    for part in parts:
        assert any(part in name and g.abs().max() > 1e-4 for name, g in expected_gradients.items()), part


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_curve(gloo, models, expected_curve, layout):
    """Norms and clipping count every expert once; the distributed optimizer updates all of them."""
    for curve in gloo(layout.world_size, _curve, layout, models):
        assert_close(curve, expected_curve, 1e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(gloo, models, expected_curve, recompute):
    assert_close(gloo(1, _curve, ONE, models, recompute=recompute)[0], expected_curve, 1e-6)


def _save_after_2(
    layout: ParallelLayout, models: Path, folder: Path, optimizer: OptimizerConfig
) -> list[dict[str, float]]:
    run = build_run(layout, models, student_name="student", optimizer=optimizer)
    run.train(range(2))
    store = CheckpointStore(folder, 1, run.groups, models / "student", {})
    store.save(2, run.student.gpt, run.student.optimizer, {})
    return run.train(range(2, 4))


def _resume(
    layout: ParallelLayout, models: Path, folder: Path, optimizer: OptimizerConfig
) -> list[dict[str, float]]:
    run = build_run(layout, models, student_name="student", optimizer=optimizer)
    store = CheckpointStore(folder, 1, run.groups, models / "student", {})
    store.load(published(folder)[-1], run.student.gpt, run.student.optimizer)
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


def test_bf16_follows_float32(gloo, models, expected_curve):
    curve = gloo(1, _curve, ONE, models, precision="bf16")[0]
    keys = ("loss", "reverse_kl", "grad_norm")
    chosen, expected = (
        [{key: step[key] for key in keys} for step in each] for each in (curve, expected_curve)
    )
    assert_close(chosen, expected, 5e-2)
