"""Parameters: the published totals of the shipped models, and every rank's against the model that is built."""

from pathlib import Path

import pytest

from megatron_opd.models.architecture import read_architecture
from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.plan.parameters import stage_parameters

MODELS = Path(__file__).parents[2] / "examples/plans/models"


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("Qwen3-0.6B", 596_049_920, 596_049_920),
        ("Qwen3-1.7B", 1_720_574_976, 1_720_574_976),
        ("Qwen3-4B", 4_022_468_096, 4_022_468_096),
        ("Qwen3-30B-A3B", 30_532_122_624, 3_353_032_704),
        ("Qwen3-30B-A3B-Instruct-2507", 30_532_122_624, 3_353_032_704),
        ("Qwen3-235B-A22B-Instruct-2507", 235_093_634_560, 22_190_763_520),
    ],
)
def test_totals_of_the_shipped_models(name: str, total: int, active: int) -> None:
    arch = read_architecture(MODELS / name)
    assert (arch.parameter_count(), arch.parameter_count(active=True)) == (total, active)


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(),
        ParallelLayout(tensor=4, sequence_parallel=True),
        ParallelLayout(pipeline=2),
        ParallelLayout(pipeline=4, virtual_pipeline=3),
        ParallelLayout(data=8, expert=8),
    ],
    ids=str,
)
def test_the_ranks_together_hold_the_model(layout: ParallelLayout) -> None:
    """Matrices add up over the tensor- and expert-parallel ranks of all stages; norms are on every rank."""
    arch = read_architecture(MODELS / "Qwen3-30B-A3B")
    vocab = arch.padded_vocab_size(layout.tensor)
    parameters = [
        p for stage in range(layout.pipeline) for c in stage_parameters(arch, layout, vocab, stage) for p in c
    ]
    experts = sum(p.numel for p in parameters if p.expert) * layout.expert
    router = arch.num_layers * arch.num_experts * arch.hidden_size
    norms = arch.num_layers * 2 * (arch.hidden_size + arch.head_dim) + arch.hidden_size
    dense = (
        (sum(p.numel for p in parameters if not p.expert) - router - norms) * layout.tensor + router + norms
    )
    padding = 2 * (vocab - arch.vocab_size) * arch.hidden_size
    assert experts + dense == arch.parameter_count() + padding


def test_a_tied_embedding_is_on_two_stages() -> None:
    arch = read_architecture(MODELS / "Qwen3-4B")
    first, last = (
        [p for chunk in stage_parameters(arch, ParallelLayout(pipeline=2), 151936, stage) for p in chunk]
        for stage in (0, 1)
    )
    assert first[0].shared_embedding and last[-1].shared_embedding and first[0].numel == last[-1].numel
    assert not any(p.shared_embedding for p in stage_parameters(arch, ParallelLayout(), 151936, 0)[0])
