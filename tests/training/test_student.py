"""The optimizers that `optimizer.name` offers: what a step does to the weights, and resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opd.checkpoint.published import Retention, published
from megatron_opd.checkpoint.store import CheckpointStore
from megatron_opd.config.schema import OptimizerConfig
from megatron_opd.parallel.groups import ParallelLayout
from tests.training.tiny_run import assert_close, build_run

SGD = OptimizerConfig(name="sgd", lr=0.1, warmup_steps=2, weight_decay=0.1)
DP2 = ParallelLayout(data=2)


def _steps(models: Path, optimizer: OptimizerConfig) -> tuple[list[Any], list[float]]:
    """Weights before and after, and gradients, of the query-key-value matrix and a norm; learning rates."""
    run = build_run(ParallelLayout(), models, optimizer=optimizer)
    layer = run.student.chunks[0].decoder.layers[1]
    weights = [layer.self_attention.linear_qkv.weight, layer.input_layernorm.weight]
    rows, rates = [], []
    for step in range(2):
        run.student.start_step()
        run.forward_backward(step)
        before = [weight.detach().clone() for weight in weights]
        gradients = [weight.main_grad.clone() for weight in weights]
        run.student.apply_gradients()
        rows.append((before, gradients, [weight.detach().clone() for weight in weights]))
        rates.append(run.student.learning_rate)
    return rows, rates


def test_sgd_takes_rate_times_gradient_and_decay(gloo, models):
    """No momentum: the second step is like the first. Norms do not decay."""
    rows, rates = gloo(1, _steps, models, SGD.model_copy(update={"clip_grad": 0.0}))[0]
    assert rates == pytest.approx([0.05, 0.1])
    for (before, gradients, after), rate in zip(rows, rates, strict=True):
        for weight, gradient, moved, decay in zip(before, gradients, after, (0.1, 0.0), strict=True):
            torch.testing.assert_close(moved, weight - rate * (gradient + decay * weight))
            assert (rate * gradient).abs().max() > 1e-4


def _save_after_2(models: Path, folder: Path, precision: str) -> list[dict[str, float]]:
    run = build_run(DP2, models, optimizer=SGD, precision=precision)
    run.train(range(2))
    store = CheckpointStore(folder, Retention(1), run.groups, models / "student-True", {})
    store.save(2, run.student.chunks, run.student.optimizer, {})
    store.publish()
    return run.train(range(2, 4))


def _resume(layout: ParallelLayout, models: Path, folder: Path, precision: str) -> list[dict[str, float]]:
    run = build_run(layout, models, optimizer=SGD, precision=precision)
    store = CheckpointStore(folder, Retention(1), run.groups, models / "student-True", {})
    store.load(published(folder)[-1], run.student.chunks, run.student.optimizer)
    run.student.continue_after(2)
    return run.train(range(2, 4))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sgd_resumes(gloo, models, tmp_path, precision):
    """float32 masters of bf16 weights are part of the checkpoint; the layout may change."""
    expected = gloo(2, _save_after_2, models, tmp_path, precision)[0]
    assert gloo(2, _resume, DP2, models, tmp_path, precision)[0] == expected
    other = gloo(2, _resume, ParallelLayout(pipeline=2), models, tmp_path, precision)[0]
    assert_close(other, expected, 1e-5 if precision == "fp32" else 2e-2)
