"""Weights that several ranks hold, and the head: their gradients are complete on every rank that has them.

The embedding of a tied model lies on the first and on the last pipeline stage, each of which sees one of its two uses.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opd.config.schema import OptimizerConfig
from megatron_opd.parallel.groups import ParallelLayout as Layout
from tests.tiny import VOCAB
from tests.training.parity import SGD
from tests.training.tiny_run import build_run

WHOLE = OptimizerConfig(
    distributed=False
)  # the distributed optimizer leaves a rank the sum of its own part only


def _embedding(layout: Layout, models: Path) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """This rank's tensor-parallel rank; gradients and, after three steps, weights of the embedding's copies here."""
    run = build_run(layout, models, optimizer=SGD)
    copies = {}
    if run.student.chunks[0].pre_process:
        copies["first"] = run.student.chunks[0].embedding.word_embeddings.weight
    if run.student.chunks[-1].post_process:
        copies["last"] = run.student.chunks[-1].head_weight
    run.forward_backward(0)
    gradients = {stage: weight.main_grad.clone() for stage, weight in copies.items()}
    run.train(range(3))
    return run.groups.tp.rank(), gradients, {stage: weight.detach() for stage, weight in copies.items()}


def _assembled(ranks: list[Any], what: int, stage: str) -> Tensor:
    """The whole table, from the shards on one stage; replicas must agree to the bit."""
    shards: dict[int, Tensor] = {}
    for rank in ranks:
        if stage in rank[what]:
            assert torch.equal(shards.setdefault(rank[0], rank[what][stage]), rank[what][stage])
    return torch.cat([shards[rank] for rank in sorted(shards)])


@pytest.mark.parametrize(
    "layout",
    [
        Layout(pipeline=2),
        Layout(tensor=2, pipeline=2),
        Layout(pipeline=2, virtual_pipeline=2, data=2),
        pytest.param(Layout(pipeline=4), marks=pytest.mark.full),
        pytest.param(Layout(tensor=2, pipeline=2, sequence_parallel=True), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_tied_embedding_on_both_ends_of_a_pipeline(gloo, models, layout):
    (_, gradients, weights), *_ = gloo(1, _embedding, Layout(), models)
    ranks = gloo(layout.world_size, _embedding, layout, models)
    for what, expected, tolerance in ((1, gradients["first"], 1e-5), (2, weights["first"], 1e-5)):
        first, last = (_assembled(ranks, what, stage) for stage in ("first", "last"))
        assert torch.equal(first, last)
        gap = (first - expected)[:VOCAB].norm() / expected[:VOCAB].norm()
        assert gap < tolerance
        assert first[VOCAB:].abs().max() == 0.0, "rows that no token has"


def test_both_uses_of_a_tied_embedding_have_a_gradient(gloo, models):
    """Else a copy that is left out of the sum would not show."""
    (_, gradients, _), *_ = gloo(1, _embedding, Layout(), models)
    untied = gloo(1, _head, Layout(), models, False)[0]["embedding"]
    assert untied[:VOCAB].abs().max() > 1e-3
    assert (gradients["first"] - untied)[:VOCAB].abs().max() > 1e-3


def _head(layout: Layout, models: Path, tied: bool) -> dict[str, Tensor]:
    """Main gradients of this rank's shards of head and embedding, and of the final norm before the head."""
    run = build_run(layout, models, tied=tied, optimizer=WHOLE)
    run.forward_backward(0)
    first, last = run.student.chunks[0], run.student.chunks[-1]
    found = {"embedding": first.embedding.word_embeddings.weight} if first.pre_process else {}
    if last.post_process:
        found |= {"head": last.head_weight, "norm": last.decoder.final_layernorm.weight}
    return {name: weight.main_grad.clone() for name, weight in found.items()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2, sequence_parallel=True),
        Layout(tensor=2, sequence_parallel=True, pipeline=2),
        pytest.param(Layout(tensor=2, sequence_parallel=True, data=2), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_head_under_sequence_parallelism(gloo, models, layout, tied):
    """Each rank has half of the positions before the head and half of the vocabulary after it."""
    expected = gloo(1, _head, Layout(), models, tied)[0]
    ranks = gloo(layout.world_size, _head, layout, models, tied)
    for number, rank in enumerate(ranks):
        if "head" not in rank:
            continue
        rows = len(rank["head"])
        real = min(VOCAB - rows * (number % 2), rows)
        mine = expected["head"][rows * (number % 2) :][:real]
        assert (rank["head"][:real] - mine).norm() < 1e-5 * expected["head"].norm()
        assert (rank["norm"] - expected["norm"]).norm() < 1e-5 * expected["norm"].norm()
