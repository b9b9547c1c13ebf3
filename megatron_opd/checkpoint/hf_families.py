"""Which Hugging Face tensors make up which megatron parameter: one table a family, for import and export.

A row of a table says: megatron's name, how the Hugging Face tensors are laid out in it, how it is cut over
the tensor-parallel ranks, and names and dimensions of those tensors. `{layer}` is the global layer number,
from 0.

Layouts (a shard is what one tensor-parallel rank holds):

- `direct`   the tensor itself
- `qkv`      for each key/value group: its query heads, its key head, its value head (weights and biases)
- `gate_up`  a shard holds its gate rows, then its up rows
- `vocab`    rows are token ids, padded with zero rows to the padded vocabulary, which export cuts off again

Shardings: `rows` (dimension 0 cut into TP equal parts), `cols` (dimension 1), `replicated`.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from megatron_opd.models.architecture import Architecture
from megatron_opd.models.gpt import GPT

Layout = Literal["direct", "qkv", "gate_up", "vocab"]
Sharding = Literal["rows", "cols", "replicated"]
ReadSlice = Callable[[str, int, int, int], Tensor]
"""`read(name, dim, start, stop)`: that part of a Hugging Face tensor."""

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Weight:
    """One megatron parameter and the Hugging Face tensors (name, dimensions) it is made of."""

    megatron: str
    layout: Layout
    sharding: Sharding
    hf: tuple[tuple[str, str], ...]

    @property
    def in_layer(self) -> bool:
        """Whether every layer has one (the names then hold `{layer}`)."""
        return "{layer}" in self.megatron

    def of_layer(self, layer: int) -> "Weight":
        """This row with the layer's number (global, from 0) filled in."""
        return replace(
            self,
            megatron=self.megatron.format(layer=layer),
            hf=tuple((name.format(layer=layer), dims) for name, dims in self.hf),
        )


def _row(megatron: str, layout: Layout, sharding: Sharding, hf: dict[str, str]) -> Weight:
    return Weight(megatron, layout, sharding, tuple(hf.items()))


def _layer(megatron: str, layout: Layout, sharding: Sharding, hf: dict[str, str]) -> Weight:
    in_hf = {f"model.layers.{{layer}}.{name}": dims for name, dims in hf.items()}
    return _row(f"decoder.layers.{{layer}}.{megatron}", layout, sharding, in_hf)


# fmt: off
_FIRST = _row("embedding.word_embeddings.weight", "vocab", "rows", {EMBEDDING: "vocab hidden"})
_LAYER = (
    _layer("input_layernorm.weight", "direct", "replicated", {"input_layernorm.weight": "hidden"}),
    _layer("self_attention.linear_qkv.weight", "qkv", "rows", {
        "self_attn.q_proj.weight": "query hidden",
        "self_attn.k_proj.weight": "key hidden",
        "self_attn.v_proj.weight": "key hidden",
    }),
    _layer("self_attention.linear_proj.weight", "direct", "cols", {
        "self_attn.o_proj.weight": "hidden query",
    }),
    _layer("pre_mlp_layernorm.weight", "direct", "replicated", {"post_attention_layernorm.weight": "hidden"}),
    _layer("mlp.linear_fc1.weight", "gate_up", "rows", {
        "mlp.gate_proj.weight": "ffn hidden",
        "mlp.up_proj.weight": "ffn hidden",
    }),
    _layer("mlp.linear_fc2.weight", "direct", "cols", {"mlp.down_proj.weight": "hidden ffn"}),
)
_LAST = (
    _row("decoder.final_layernorm.weight", "direct", "replicated", {"model.norm.weight": "hidden"}),
    _row("output_layer.weight", "vocab", "rows", {LM_HEAD: "vocab hidden"}),
)
_QKV_BIAS = _layer("self_attention.linear_qkv.bias", "qkv", "rows", {
    "self_attn.q_proj.bias": "query",
    "self_attn.k_proj.bias": "key",
    "self_attn.v_proj.bias": "key",
})
_QK_NORMS = (
    _layer("self_attention.q_layernorm.weight", "direct", "replicated", {"self_attn.q_norm.weight": "head"}),
    _layer("self_attention.k_layernorm.weight", "direct", "replicated", {"self_attn.k_norm.weight": "head"}),
)
# fmt: on

FAMILIES: dict[str, tuple[Weight, ...]] = {
    "llama": (_FIRST, *_LAYER, *_LAST),
    "qwen2": (_FIRST, *_LAYER, _QKV_BIAS, *_LAST),
    "qwen3": (_FIRST, *_LAYER, *_QK_NORMS, *_LAST),
}


def model_weights(arch: Architecture) -> Iterator[Weight]:
    """Every parameter of the whole model, embedding first, then layer by layer.

    With tied embeddings `output_layer.weight`, which only the last of several pipeline stages has, is made of
    the embedding's tensor too.
    """
    for in_layer, part in groupby(FAMILIES[arch.family], key=lambda weight: weight.in_layer):
        rows = list(part)
        if in_layer:
            for layer in range(arch.num_layers):
                yield from (row.of_layer(layer) for row in rows)
        else:
            for row in rows:
                tied = arch.tied_embeddings and row.megatron == "output_layer.weight"
                yield replace(row, hf=_FIRST.hf) if tied else row


def hf_shapes(weight: Weight, arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensors that the parameter is made of: name -> shape."""
    sizes = {
        "vocab": arch.vocab_size,
        "hidden": arch.hidden_size,
        "query": arch.num_heads * arch.head_dim,
        "key": arch.num_kv_groups * arch.head_dim,
        "head": arch.head_dim,
        "ffn": arch.ffn_size,
    }
    return {name: tuple(sizes[dim] for dim in dims.split()) for name, dims in weight.hf}


def stage_parameters(model: GPT) -> dict[str, torch.nn.Parameter]:
    """A pipeline stage's parameters under the names of the tables: layers numbered globally, from 0."""
    named = {}
    for name, parameter in model.named_parameters():
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        if match:
            layer = model.decoder.layers[int(match[1])].layer_number - 1
            name = f"decoder.layers.{layer}.{match[2]}"
        named[name] = parameter
    return named


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
    shapes = hf_shapes(weight, arch)
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
        return [shards[0]]
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
