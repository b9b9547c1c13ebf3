"""The same recorded rollouts give the same gradients and the same training curve in every layout."""

from typing import Any

import pytest

from megatron_opd.config.schema import OptimizerConfig
from megatron_opd.parallel.groups import ParallelLayout
from tests.training.tiny_run import TOTAL_STEPS, assert_close, build_run, save_pair

ONE = ParallelLayout()
PAIRWISE = [
    ParallelLayout(tensor=2, pipeline=2),
    ParallelLayout(data=2),
    ParallelLayout(tensor=2, sequence_parallel=True),
    ParallelLayout(pipeline=2, data=2),
    ParallelLayout(tensor=2, sequence_parallel=True, data=2),
    ParallelLayout(pipeline=4),
    ParallelLayout(pipeline=2, virtual_pipeline=2),
    ParallelLayout(tensor=2, sequence_parallel=True, pipeline=2, virtual_pipeline=2),
    ParallelLayout(pipeline=2, data=2, virtual_pipeline=2),
]
REST = [  # of all layouts on up to 4 ranks
    ParallelLayout(tensor=2),
    ParallelLayout(pipeline=2),
    ParallelLayout(data=4),
    ParallelLayout(tensor=2, data=2),
    ParallelLayout(tensor=2, pipeline=2, sequence_parallel=True),
]
LAYOUTS = [*PAIRWISE, *(pytest.param(layout, marks=pytest.mark.full) for layout in REST)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_pair(folder)
    return folder


def _gradients(layout: ParallelLayout, models: Any, tied: bool, **options: Any) -> dict[str, Any]:
    whole = OptimizerConfig(distributed=False)  # the distributed optimizer reduces a shard of them only
    run = build_run(layout, models, tied=tied, optimizer=whole, **options)
    run.forward_backward(0)
    return run.gradients()


def _curve(layout: ParallelLayout, models: Any, **options: Any) -> list[dict[str, float]]:
    return build_run(layout, models, **options).train(range(TOTAL_STEPS))


@pytest.fixture(scope="module")
def expected_gradients(gloo, models):
    return {tied: gloo(1, _gradients, ONE, models, tied)[0] for tied in (True, False)}


@pytest.fixture(scope="module")
def expected_curve(gloo, models):
    return {tied: gloo(1, _curve, ONE, models, tied=tied)[0] for tied in (True, False)}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_main_gradients_at_step_1(gloo, models, expected_gradients, layout, tied):
    expected = expected_gradients[tied]
    for gradients in gloo(layout.world_size, _gradients, layout, models, tied):
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert (gradient - expected[name]).abs().max() < 1e-5, name
    assert all(gradient.abs().max() > 1e-4 for gradient in expected.values()), "gradients that say something"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", [ONE, *PAIRWISE], ids=str)
def test_a_head_in_chunks_gives_the_same_gradients(gloo, models, expected_gradients, layout, tied):
    """Its gradient goes to megatron's buffer directly, also where the embedding's goes there through autograd."""
    for gradients in gloo(layout.world_size, _gradients, layout, models, tied, head_chunk=7):
        for name, gradient in gradients.items():
            assert (gradient - expected_gradients[tied][name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_curve_over_5_steps(gloo, models, expected_curve, layout, tied):
    for curve in gloo(layout.world_size, _curve, layout, models, tied=tied):
        assert_close(curve, expected_curve[tied], 1e-5)


def _few(layout: ParallelLayout, models: Any, rollouts: int) -> dict[str, Any]:
    run = build_run(layout, models, optimizer=OptimizerConfig(distributed=False))
    run.forward_backward(0, rollouts)
    return run.gradients()


@pytest.mark.parametrize("layout", [ParallelLayout(data=2), ParallelLayout(pipeline=2, data=2)], ids=str)
def test_a_replica_without_any_response_token(gloo, models, layout):
    """One rollout for two replicas: one of them runs an empty microbatch and still takes part."""
    expected = gloo(1, _few, ONE, models, 1)[0]
    for gradients in gloo(layout.world_size, _few, layout, models, 1):
        for name, gradient in gradients.items():
            assert (gradient - expected[name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("layout", [ParallelLayout(tensor=2), ParallelLayout(tensor=2, pipeline=2)], ids=str)
def test_sharded_biases_count_in_the_gradient_norm(gloo, models, layout):
    """Qwen2 has a bias in the query, key and value projection, sharded like its weight."""
    expected = gloo(1, _curve, ONE, models, student_name="student-qwen2")[0]
    for curve in gloo(layout.world_size, _curve, layout, models, student_name="student-qwen2"):
        assert_close(curve, expected, 1e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(gloo, models, expected_curve, recompute):
    assert_close(gloo(1, _curve, ONE, models, recompute=recompute)[0], expected_curve[True], 1e-6)


def test_plain_optimizer_agrees_with_the_distributed_one(gloo, models):
    optimizers = [OptimizerConfig(lr=1e-3, weight_decay=0.1, distributed=flag) for flag in (True, False)]
    curves = [gloo(2, _curve, ParallelLayout(data=2), models, optimizer=each)[0] for each in optimizers]
    assert_close(curves[0], curves[1], 1e-6)


@pytest.mark.parametrize("head_chunk", [None, 7])
def test_bf16_follows_float32(gloo, models, expected_curve, head_chunk):
    curve = gloo(1, _curve, ONE, models, precision="bf16", head_chunk=head_chunk)[0]
    assert_close(curve, expected_curve[True], 5e-2)
