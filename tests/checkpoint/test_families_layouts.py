"""Every family in a megatron model: transformers' logits at every layout, and the same bits back again."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_opd.checkpoint.convert import hf_to_megatron
from megatron_opd.models.architecture import read_architecture
from megatron_opd.parallel.groups import ParallelLayout
from tests.checkpoint.models import FAMILIES, hf_logits, megatron_results, write_hf
from tests.gloo_pool import GlooPools
from tests.models.rope_variants import ROPE_VARIANTS

CASES = [(family, tied) for family in FAMILIES for tied in (True, False)]
PAIRWISE = [
    (1, 1, 1),
    (1, 2, 1),
    (2, 1, 2),
    (2, 2, 1),
    (4, 1, 1),
]  # (TP, PP, EP): of TP and PP all pairs but one
MATRIX = [
    pytest.param(
        sizes, marks=() if sizes in PAIRWISE else pytest.mark.full, id="TP{}-PP{}-EP{}".format(*sizes)
    )
    for sizes in product((1, 2, 4), (1, 2), (1, 2))
] + [pytest.param((1, 2, 2, 2), id="TP1-PP2-EP2-VPP2")]


def layout_for(folder: Path, tensor: int, pipeline: int, expert: int, virtual: int = 1) -> ParallelLayout:
    """The layout with the fewest ranks; a dense model has two replicas where experts would be shared."""
    if read_architecture(folder).moe is None:
        return ParallelLayout(tensor=tensor, pipeline=pipeline, data=expert, virtual_pipeline=virtual)
    return ParallelLayout(
        tensor=tensor,
        pipeline=pipeline,
        data=expert if tensor == 1 else 1,
        expert=expert,
        sequence_parallel=tensor > 1,
        virtual_pipeline=virtual,
    )


def assert_same(gloo: GlooPools, source: Path, folder: Path, layout: ParallelLayout) -> None:
    """The model of `source` at a layout has transformers' logits of `folder` and gives back its bits."""
    expected, tensors = hf_logits(folder), load_file(folder / "model.safetensors")
    assert expected.std() > 0.5
    results = gloo(layout.world_size, megatron_results, source, layout)
    assert any(logits is not None for logits, _, _ in results)
    for logits, exported, padding in results:
        if logits is not None:
            torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
        assert exported.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert exported[name].dtype == tensor.dtype and torch.equal(exported[name], tensor), name
        assert padding == 0.0


@pytest.fixture(scope="module", params=CASES, ids=[f"{f}-{'tied' if t else 'untied'}" for f, t in CASES])
def folder(request, tmp_path_factory) -> Path:
    family, tied = request.param
    target = tmp_path_factory.mktemp("hf") / "model"
    return write_hf(target, family, tied=tied, num_key_value_heads=4)  # TP 4 needs as many


@pytest.mark.parametrize("sizes", MATRIX)
def test_import_gives_transformers_logits_and_export_the_same_bits(gloo, folder, sizes):
    assert_same(gloo, folder, folder, layout_for(folder, *sizes))


@pytest.mark.parametrize(
    "sizes", [(2, 2, 1), (1, 2, 1, 2), pytest.param((2, 2, 2), marks=pytest.mark.full)], ids=str
)
def test_megatron_folder_gives_the_same(gloo, folder, tmp_path, sizes):
    hf_to_megatron(folder, tmp_path / "megatron")
    assert_same(gloo, tmp_path / "megatron", folder, layout_for(folder, *sizes))


@pytest.mark.parametrize(
    ("variant", "family", "sizes"),
    [
        (variant, family, sizes)
        for (variant, family), sizes in zip(
            zip(ROPE_VARIANTS, ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "llama"], strict=True),
            [(1, 1, 1), (2, 1, 1), (1, 2, 1)] * 2,
            strict=True,
        )
    ],
)
def test_rope_variants_give_transformers_logits(gloo, tmp_path, variant, family, sizes):
    folder = write_hf(tmp_path / "hf", family, tied=True, rope_parameters=dict(ROPE_VARIANTS[variant]))
    assert_same(gloo, folder, folder, layout_for(folder, *sizes))


@pytest.mark.parametrize("chosen", [1, 3])
def test_experts_with_their_plain_probabilities(gloo, tmp_path, chosen):
    changes: dict[str, Any] = {
        "norm_topk_prob": False,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": 96,
    }
    folder = write_hf(tmp_path / "hf", "qwen3_moe", tied=False, **changes)
    assert_same(gloo, folder, folder, layout_for(folder, 1, 1, 2))
