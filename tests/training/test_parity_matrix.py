"""The parity matrix: in every layout the same recorded rollouts give what one process computes.

Compared are the statistics and the weight in the loss of every token, the main gradients of the first step, sums and
gradient norms of three steps, and how far these moved every parameter.

Tolerances. float32 rounds every operation to 6e-8 and layouts differ in the order of sums of 10 to 1,000 terms: the
largest difference seen is 6e-6 (curves start from weights that differ by that). One token lost or counted twice moves
sums and gradients by 1/137, more than 1e-3. Movements are seen through weights of size 1, which keep 6e-8 of steps that
are sometimes 1e-3: 1e-4. bf16 keeps 8 bits of every activation, and these models amplify what is lost: there the same
quantities are held to the float32 run at 3 to 15 %, with float32 masters and gradients.
"""

from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opd.config.schema import OptimizerConfig
from megatron_opd.parallel.groups import ParallelLayout as Layout
from tests.gloo_pool import GlooPools
from tests.training.parity import Observed, Row, differences, observe, save_models
from tests.training.tiny_run import SCHEDULED

TOLERANCES = {
    "fp32": {"tokens": 1e-5, "gradients": 1e-5, "curve": 1e-5, "moved": 1e-4},
    "bf16": {"tokens": 0.05, "gradients": 0.15, "curve": 0.03, "moved": 0.15},
}
SP2: dict[str, Any] = {"tensor": 2, "sequence_parallel": True}
VPP2: dict[str, Any] = {"pipeline": 2, "virtual_pipeline": 2}
ROWS = [
    Row("tied", Layout(tensor=2, pipeline=2)),
    Row("tied", Layout(pipeline=2, data=2), head_chunk=7),
    Row("untied", Layout(**SP2, data=2), head_chunk=7),
    Row("untied", Layout(**SP2, **VPP2)),
    Row("tied", Layout(**VPP2, data=2)),
    Row("moe", Layout(**SP2)),  # every expert on both ranks, each sees half of the tokens
    Row("moe", Layout(**SP2, data=2, expert=2)),
    Row("moe", Layout(**VPP2, data=2, expert=2)),
    Row("untied", Layout(**SP2, context=2)),
    Row("tied", Layout(**VPP2, context=2)),
    Row("moe", Layout(context=2, data=2, expert=4)),
    Row("biases", Layout(tensor=2, pipeline=2)),
    Row("tied", Layout(**SP2), recompute="full"),
    Row("untied", Layout(pipeline=2), recompute="selective"),
    Row("moe", Layout(data=2, expert=2), recompute="full"),
    Row("tied", Layout(context=2), recompute="selective", head_chunk=7),
    Row("tied", Layout(), head_chunk=7),
    Row("untied", Layout(), head_chunk=7),
    Row("tied", Layout(), precision="bf16", head_chunk=7),
    Row("tied", Layout(**SP2, data=2), precision="bf16"),
    Row("moe", Layout(pipeline=2, data=2, expert=2), precision="bf16"),
    # The rest of the product that says something of its own, and 8 processes.
    Row("untied", Layout(tensor=2), full=True),
    Row("tied", Layout(**SP2), full=True),
    Row("tied", Layout(pipeline=2), full=True),
    Row("untied", Layout(data=4), full=True),
    Row("tied", Layout(pipeline=4), full=True),
    Row("tied", Layout(**SP2, pipeline=2), head_chunk=7, full=True),
    Row("biases", Layout(tensor=2), full=True),
    Row("tied", Layout(context=4), full=True),
    Row("untied", Layout(tensor=2, context=2), full=True),
    Row("tied", Layout(pipeline=2, context=2), full=True),
    Row("untied", Layout(context=2, data=2), recompute="full", full=True),
    Row("tied", Layout(**VPP2), precision="bf16", full=True),
    Row("tied", Layout(context=2), precision="bf16", full=True),
    Row("moe", Layout(data=2), full=True),
    Row("moe", Layout(**SP2, expert=2), full=True),
    Row("moe", Layout(context=2), full=True),
    Row("moe", Layout(**SP2, context=2, expert=4), full=True),
    Row("moe", Layout(**SP2, data=2, expert=4), full=True),
    Row("moe", Layout(**SP2, pipeline=2, expert=2), recompute="selective", full=True),
    Row("tied", Layout(**SP2, pipeline=2, data=2), full=True),
    Row("untied", Layout(**SP2, **VPP2, data=2), recompute="full", full=True),
    Row("moe", Layout(**SP2, pipeline=2, data=2, expert=4), full=True),
    Row("tied", Layout(**SP2, **VPP2, context=2), full=True),
    Row("moe", Layout(**SP2, context=2, data=2, expert=4), full=True),
    Row("untied", Layout(pipeline=2, context=2, data=2), head_chunk=7, full=True),
    Row("moe", Layout(**SP2, **VPP2, data=2, expert=2), precision="bf16", full=True),
]
SHARDED = [  # over the replicas, experts over theirs
    Row("tied", Layout(data=2)),
    Row("untied", Layout(pipeline=2, data=2)),
    Row("moe", Layout(**SP2, data=2, expert=2)),
    Row("tied", Layout(context=2)),
    Row("moe", Layout(data=4, expert=2), full=True),
    Row("untied", Layout(context=2, data=2), full=True),
    Row("tied", Layout(**SP2, **VPP2, data=2), full=True),
]


def _cases(rows: list[Row]) -> list[Any]:
    return [pytest.param(row, id=str(row), marks=[pytest.mark.full] if row.full else []) for row in rows]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def one_process(gloo: GlooPools, models: Path) -> Any:
    """`one_process(model, *optimizer)`: what a single process observes in float32."""
    return cache(lambda model, *optimizer: gloo(1, observe, Row(model), models, *optimizer)[0])


def assert_same(row: Row, ranks: list[Observed], expected: Observed, kinds: tuple[str, ...]) -> None:
    """Every rank's numbers are within the tolerances of the row's precision; together the ranks saw every token."""
    for rank in ranks:
        found = differences(rank, expected)
        for kind in kinds:
            gap, where = found[kind]
            assert gap <= TOLERANCES[row.precision][kind], f"{kind}: {gap:.1e} in {where}"
        assert rank.main_dtypes == {torch.float32}
    assert set().union(*(rank.tokens for rank in ranks)) == expected.tokens.keys()


@pytest.mark.parametrize("row", _cases(ROWS))
def test_as_in_one_process(gloo: GlooPools, models: Path, one_process: Any, row: Row) -> None:
    ranks = gloo(row.layout.world_size, observe, row, models)
    assert_same(row, ranks, one_process(row.model), ("tokens", "gradients", "curve", "moved"))


@pytest.mark.parametrize("row", _cases(SHARDED))
def test_with_a_sharded_adam(gloo: GlooPools, models: Path, one_process: Any, row: Row) -> None:
    """Gradients are scattered over replicas, weights gathered from them; clipping counts every shard once."""
    ranks = gloo(row.layout.world_size, observe, row, models, SCHEDULED)
    assert_same(row, ranks, one_process(row.model, SCHEDULED), ("tokens", "gradients", "curve"))


def test_a_sharded_adam_moves_weights_as_a_whole_one(gloo: GlooPools, models: Path) -> None:
    """On the same two replicas, where gradients are the same to the last bits."""
    row = Row("tied", Layout(data=2))
    sharded, whole = (
        gloo(2, observe, row, models, OptimizerConfig(lr=1e-3, weight_decay=0.1, distributed=distributed))[0]
        for distributed in (True, False)
    )
    for name, moved in whole.moved.items():
        assert (sharded.moved[name] - moved).abs().max() < 1e-6, name


def test_gradients_say_something(one_process: Any) -> None:
    for model in ("tied", "untied", "biases", "moe"):
        observed = one_process(model)
        assert len(observed.tokens) == 137
        for name, gradient in observed.gradients.items():
            assert gradient.abs().max() > 1e-4 and observed.moved[name].abs().max() > 1e-4, name


def _parallelisms(layout: Layout) -> set[str]:
    used = {
        "TP": layout.tensor > 1,
        "SP": layout.sequence_parallel,
        "PP": layout.pipeline > 1,
        "VPP": layout.virtual_pipeline > 1,
        "CP": layout.context > 1,
        "DP": layout.data > 1,
        "EP": layout.expert > 1,
    }
    return {name for name, flag in used.items() if flag}


def test_quick_rows_hold_every_pair_of_parallelisms() -> None:
    held = [_parallelisms(row.layout) for row in ROWS if not row.full]
    names = sorted(set().union(*(_parallelisms(row.layout) for row in ROWS)))
    missing = [pair for pair in combinations(names, 2) if not any(set(pair) <= used for used in held)]
    assert missing == []
