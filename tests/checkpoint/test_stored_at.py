"""Where the tables say that a parameter is stored, against megatron-core's own sharded state dict."""

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_opd.checkpoint.hf_families import (
    model_weights,
    shard_from_hf,
    stage_parameters,
    stored_at,
)
from megatron_opd.checkpoint.pieces import empty_objects
from megatron_opd.checkpoint.weights import sharded_weights
from megatron_opd.models.architecture import Architecture, read_architecture
from megatron_opd.models.families.rows import Weight
from megatron_opd.models.gpt import build_gpt
from megatron_opd.parallel import cpu
from megatron_opd.parallel.groups import ParallelLayout, build_groups
from tests.checkpoint.models import FAMILIES, write_hf


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(shape, generator=generator)


def shard(weight: Weight, arch: Architecture, padded: int, tp_rank: int, tp_size: int) -> torch.Tensor:
    shapes = weight.shapes(arch.dimensions)

    def read(name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        return random_tensor(name, shapes[name]).narrow(dim, start, stop - start)

    return shard_from_hf(weight, arch, read, tp_rank=tp_rank, tp_size=tp_size, padded_vocab_size=padded)


def compare_with_megatron(folder, layout: ParallelLayout) -> tuple[set[str], set[str]]:
    """Asserts on this rank; returns (names of its parameters, keys of its empty objects)."""
    cpu.install()
    groups = build_groups(layout)
    arch = read_architecture(folder)
    padded = arch.padded_vocab_size(layout.tensor)
    chunks = build_gpt(arch, layout, groups, precision="fp32", padded_vocab_size=padded)
    rows = {weight.megatron: weight for weight in model_weights(arch)}
    mine = stage_parameters(chunks)
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(shard(rows[name], arch, padded, groups.tp.rank(), layout.tensor))
    states = sharded_weights(chunks, {"dp_cp_group": groups.dp_cp}).values()
    local = [
        (state, name)
        for state, chunk in zip(states, chunks, strict=True)
        for name, _ in chunk.named_parameters()
    ]
    for (state, local_name), name in zip(local, mine, strict=True):
        entry = state.pop(local_name)
        key, axes = stored_at(rows[name], arch)
        whole = shard(rows[name], arch, padded, 0, 1)
        for block in [entry] if isinstance(entry, ShardedTensor) else entry.build():
            tied_copy = arch.tied_embeddings and name == "output_layer.weight"
            assert block.key == ("embedding.word_embeddings.weight" if tied_copy else key)
            assert block.global_shape == (*(axis[2] for axis in axes), *whole.shape), name
            assert block.global_offset[: len(axes)] == tuple(axis[1] for axis in axes), name
            place = [
                slice(start, start + size)
                for start, size in zip(block.global_offset[len(axes) :], block.data.shape, strict=True)
            ]
            assert torch.equal(whole[tuple(place)], block.data), name
    objects = [entry for state in states for entry in state.values()]
    assert all(isinstance(entry, ShardedObject) for entry in objects)
    return set(mine), {entry.unique_key for entry in objects}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_axes_and_places_are_megatrons(gloo, tmp_path, family, tied):
    folder = write_hf(tmp_path / "hf", family, tied=tied)
    arch = read_architecture(folder)
    layout = ParallelLayout(
        tensor=2,
        pipeline=2,
        sequence_parallel=True,
        expert=2 if arch.moe else 1,
        virtual_pipeline=2 if tied else 1,
    )
    results = gloo(4, compare_with_megatron, folder, layout)
    assert set().union(*(names for names, _ in results)) == {row.megatron for row in model_weights(arch)}
    objects = {key for _, keys in results for key in keys if key.startswith("decoder.layers.")}
    assert objects == set(empty_objects(arch))


def test_stored_names_of_experts_and_norms(tmp_path):
    """Spelled out once: the names under which transformer-engine's layers store them too."""
    dense, experts = (
        {weight.megatron: stored_at(weight, arch) for weight in model_weights(arch)}
        for arch in (
            read_architecture(write_hf(tmp_path / family, family, tied=True, num_hidden_layers=2))
            for family in ("qwen3", "qwen3_moe")
        )
    )
    norm = "decoder.layers.1.pre_mlp_layernorm.weight"
    assert dense[norm] == ("decoder.layers.mlp.linear_fc1.layer_norm_weight", (("layer", 1, 2),))
    assert experts[norm] == ("decoder.layers.pre_mlp_layernorm.weight", (("layer", 1, 2),))
    assert experts["decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight"] == (
        "decoder.layers.mlp.experts.experts.linear_fc2.weight",
        (("layer", 1, 2), ("expert", 3, 4)),
    )
