"""What the table of a family is made of: its rows, and the rows that most families share.

A row says: megatron's name, how the Hugging Face tensors are laid out in it, how it is cut over the tensor-parallel
ranks, and names and dimensions of those tensors. `{layer}` is the layer's number and `{expert}` the expert's, both of
the whole model, from 0.

Layouts (a shard is what one tensor-parallel rank holds):

- `direct`   the tensor itself
- `qkv`      for each key/value group: its query heads, its key head, its value head (weights and biases)
- `gate_up`  a shard holds its gate rows, then its up rows
- `vocab`    rows are token ids, padded with zero rows to the padded vocabulary, which export cuts off again

Shardings: `rows` (dimension 0 cut into TP equal parts), `cols` (dimension 1), `replicated`. Experts are `replicated`:
whole on one expert-parallel rank.

Dimensions: `vocab`, `hidden`, `query` and `key` (heads times head size), `head`, `ffn`, `experts`, `expert_ffn`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Layout = Literal["direct", "qkv", "gate_up", "vocab"]
Sharding = Literal["rows", "cols", "replicated"]

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Weight:
    """One megatron parameter and the Hugging Face tensors (name, dimensions) it is made of.

    `layer` and `expert` are the numbers that were filled in, None in a row that has none.
    """

    megatron: str
    layout: Layout
    sharding: Sharding
    hf: tuple[tuple[str, str], ...]
    layer: int | None = None
    expert: int | None = None

    @property
    def in_layer(self) -> bool:
        """Whether every layer has one (the names hold `{layer}`)."""
        return "{layer}" in self.megatron

    @property
    def in_expert(self) -> bool:
        """Whether every expert of a layer has one (the names hold `{expert}`)."""
        return "{expert}" in self.megatron

    def shapes(self, dimensions: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Hugging Face tensors that the parameter is made of: name -> shape."""
        return {name: tuple(dimensions[dim] for dim in dims.split()) for name, dims in self.hf}

    def numel(self, dimensions: Mapping[str, int]) -> int:
        """Numbers of the parameter."""
        return sum(math.prod(shape) for shape in self.shapes(dimensions).values())

    def of_layer(self, layer: int) -> "Weight":
        """This row with the layer's number filled in."""
        return replace(self._filled("{layer}", layer), layer=layer)

    def of_expert(self, expert: int) -> "Weight":
        """This row with the expert's number filled in."""
        return replace(self._filled("{expert}", expert), expert=expert)

    def _filled(self, place: str, number: int) -> "Weight":
        return replace(
            self,
            megatron=self.megatron.replace(place, str(number)),
            hf=tuple((name.replace(place, str(number)), dims) for name, dims in self.hf),
        )


@dataclass(frozen=True)
class Family:
    """A family: its `model_type` in config.json and its table, first row to last.

    `windowed` says that attention is limited to config.json's `sliding_window` unless that is null; elsewhere it is
    limited only where `use_sliding_window` says so.
    """

    model_type: str
    rows: tuple[Weight, ...]
    windowed: bool = False

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return any(row.megatron.endswith("linear_qkv.bias") for row in self.rows)

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return any(row.megatron.endswith("q_layernorm.weight") for row in self.rows)

    @property
    def experts(self) -> bool:
        """Whether the feed-forward part of every layer is a mixture of experts."""
        return any(row.in_expert for row in self.rows)


def row(megatron: str, layout: Layout, sharding: Sharding, hf: dict[str, str]) -> Weight:
    """A row of the model as a whole, with the tensors' full names."""
    return Weight(megatron, layout, sharding, tuple(hf.items()))


def layer_row(megatron: str, layout: Layout, sharding: Sharding, hf: dict[str, str]) -> Weight:
    """A row of every layer, with names inside the layer."""
    in_hf = {f"model.layers.{{layer}}.{name}": dims for name, dims in hf.items()}
    return row(f"decoder.layers.{{layer}}.{megatron}", layout, sharding, in_hf)


# fmt: off
FIRST = row("embedding.word_embeddings.weight", "vocab", "rows", {EMBEDDING: "vocab hidden"})
ATTENTION = (
    layer_row("input_layernorm.weight", "direct", "replicated", {"input_layernorm.weight": "hidden"}),
    layer_row("self_attention.linear_qkv.weight", "qkv", "rows", {
        "self_attn.q_proj.weight": "query hidden",
        "self_attn.k_proj.weight": "key hidden",
        "self_attn.v_proj.weight": "key hidden",
    }),
    layer_row("self_attention.linear_proj.weight", "direct", "cols", {
        "self_attn.o_proj.weight": "hidden query",
    }),
)
QKV_BIAS = layer_row("self_attention.linear_qkv.bias", "qkv", "rows", {
    "self_attn.q_proj.bias": "query",
    "self_attn.k_proj.bias": "key",
    "self_attn.v_proj.bias": "key",
})
QK_NORMS = (
    layer_row("self_attention.q_layernorm.weight", "direct", "replicated", {"self_attn.q_norm.weight": "head"}),
    layer_row("self_attention.k_layernorm.weight", "direct", "replicated", {"self_attn.k_norm.weight": "head"}),
)
MLP_NORM = layer_row("pre_mlp_layernorm.weight", "direct", "replicated", {
    "post_attention_layernorm.weight": "hidden",
})
MLP = (
    MLP_NORM,
    layer_row("mlp.linear_fc1.weight", "gate_up", "rows", {
        "mlp.gate_proj.weight": "ffn hidden",
        "mlp.up_proj.weight": "ffn hidden",
    }),
    layer_row("mlp.linear_fc2.weight", "direct", "cols", {"mlp.down_proj.weight": "hidden ffn"}),
)
LAST = (
    row("decoder.final_layernorm.weight", "direct", "replicated", {"model.norm.weight": "hidden"}),
    row("output_layer.weight", "vocab", "rows", {LM_HEAD: "vocab hidden"}),
)
# fmt: on
