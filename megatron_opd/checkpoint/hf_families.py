"""The families' tables applied: a model's parameters by name, and Hugging Face tensors -> shards and back.

`models.families.rows` says what the rows, layouts and shardings of a table mean.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from megatron_opd.models.architecture import Architecture
from megatron_opd.models.families import FAMILIES
from megatron_opd.models.families.rows import FIRST, Weight
from megatron_opd.models.gpt import GPT

ReadSlice = Callable[[str, int, int, int], Tensor]
"""`read(name, dim, start, stop)`: that part of a Hugging Face tensor."""


def model_weights(arch: Architecture) -> Iterator[Weight]:
    """Every parameter of the whole model, embedding first, then layer by layer, in a layer expert by expert.

    With tied embeddings `output_layer.weight`, which only the last of several pipeline stages has, is made of
    the embedding's tensor too.
    """
    for in_layer, part in groupby(FAMILIES[arch.family].rows, key=lambda weight: weight.in_layer):
        rows = list(part)
        if in_layer:
            for layer in range(arch.num_layers):
                yield from _of_experts((row.of_layer(layer) for row in rows), arch)
        else:
            for row in rows:
                tied = arch.tied_embeddings and row.megatron == "output_layer.weight"
                yield replace(row, hf=FIRST.hf) if tied else row


def _of_experts(rows: Iterable[Weight], arch: Architecture) -> Iterator[Weight]:
    for in_expert, part in groupby(rows, key=lambda weight: weight.in_expert):
        if not in_expert:
            yield from part
            continue
        assert arch.moe is not None
        expert_rows = list(part)
        for expert in range(arch.moe.num_experts):
            yield from (row.of_expert(expert) for row in expert_rows)


def stored_at(weight: Weight, arch: Architecture) -> tuple[str, tuple[tuple[str, int, int], ...]]:
    """Where megatron-core's checkpoint format keeps the parameter: (key of the stored tensor, leading axes).

    The format stacks a parameter of all layers, and of all experts, into one tensor. Each leading axis is
    (what it counts, this parameter's place, length); the rest of the shape is the parameter's own, whole.
    """
    if weight.layer is None:
        return weight.megatron, ()
    key = weight.megatron.replace(f"layers.{weight.layer}.", "layers.")
    axes = [("layer", weight.layer, arch.num_layers)]
    if weight.expert is not None:
        assert arch.moe is not None
        key = key.replace(f"local_experts.{weight.expert}.", "experts.")
        axes.append(("expert", weight.expert, arch.moe.num_experts))
    key = key.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    if arch.moe is None:
        key = key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    return key, tuple(axes)


def stage_parameters(chunks: Sequence[GPT]) -> dict[str, torch.nn.Parameter]:
    """A rank's parameters under the names of the tables: layers and experts numbered globally, from 0."""
    named = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
            if match:
                layer = chunk.decoder.layers[int(match[1])]
                name = f"decoder.layers.{layer.layer_number - 1}.{_with_global_expert(match[2], layer)}"
            named[name] = parameter
    return named


def _with_global_expert(name: str, layer: Any) -> str:
    match = re.fullmatch(r"(mlp\.experts\.local_experts\.)(\d+)(\..+)", name)
    return f"{match[1]}{layer.mlp.local_expert_indices[int(match[2])]}{match[3]}" if match else name


def shard_from_hf(
    weight: Weight,
    arch: Architecture,
    read: ReadSlice,
    *,
    tp_rank: int,
    tp_size: int,
    padded_vocab_size: int,
) -> Tensor:
    """One rank's shard of a parameter, in the Hugging Face dtype, from just the slices it needs."""
    shapes = weight.shapes(arch.dimensions)
    if weight.layout == "vocab":
        (name,) = shapes
        return _vocab_shard(name, arch, read, padded_vocab_size // tp_size, tp_rank)

    def read_part(name: str, shape: tuple[int, ...]) -> Tensor:
        if weight.sharding == "replicated":
            return read(name, 0, 0, shape[0])
        dim = 1 if weight.sharding == "cols" else 0
        width = shape[dim] // tp_size
        assert width * tp_size == shape[dim], f"{name}: {shape[dim]} is no multiple of {tp_size} ranks"
        return read(name, dim, tp_rank * width, (tp_rank + 1) * width)

    parts = [read_part(name, shape) for name, shape in shapes.items()]
    if weight.layout == "qkv":
        groups = arch.num_kv_groups // tp_size
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)
    return torch.cat(parts) if weight.layout == "gate_up" else parts[0]


def _vocab_shard(name: str, arch: Architecture, read: ReadSlice, width: int, tp_rank: int) -> Tensor:
    start, stop = (min(rank * width, arch.vocab_size) for rank in (tp_rank, tp_rank + 1))
    if start == stop:  # nothing but padding
        return torch.zeros(width, arch.hidden_size)
    rows = read(name, 0, start, stop)
    return torch.cat([rows, rows.new_zeros(width - (stop - start), arch.hidden_size)])


def hf_from_shards(weight: Weight, arch: Architecture, shards: Sequence[Tensor]) -> list[Tensor]:
    """The Hugging Face tensors, in the row's order, from every rank's shard (from any one, if replicated)."""
    if weight.sharding == "replicated":
        shards = shards[:1]
    if weight.layout == "gate_up":
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([gate for gate, _ in halves]), torch.cat([up for _, up in halves])]
    dim = 1 if weight.sharding == "cols" else 0
    full = shards[0] if len(shards) == 1 else torch.cat(list(shards), dim)
    if weight.layout == "vocab":
        return [full[: arch.vocab_size]]
    if weight.layout == "qkv":
        heads = arch.num_heads // arch.num_kv_groups
        grouped = full.unflatten(0, (arch.num_kv_groups, heads + 2, arch.head_dim))
        return [part.flatten(0, 2) for part in grouped.split([heads, 1, 1], dim=1)]
    return [full]
