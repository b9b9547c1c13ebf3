"""The parameters that a rank holds, in the order in which megatron-core registers them.

Sizes come from the family's table (`models.families`), the same one that weights are loaded by.
"""

from dataclasses import dataclass
from functools import lru_cache

from megatron_opd.models.architecture import Architecture
from megatron_opd.models.families import FAMILIES
from megatron_opd.models.families.rows import EMBEDDING, LM_HEAD, Weight
from megatron_opd.parallel.groups import ParallelLayout

_REGISTERED = (  # within a layer
    "input_layernorm",
    "self_attention.linear_proj",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "pre_mlp_layernorm",
    "mlp.router",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


@dataclass(frozen=True)
class Parameter:
    """Numbers of one parameter on one rank."""

    numel: int
    matrix: bool  # multiplied with activations: not a norm, a bias or an embedding's table
    expert: bool = False
    shared_embedding: bool = False  # the embedding or its copy on the last stage, tied across stages


@dataclass(frozen=True)
class Chunk:
    """A consecutive group of layers on one rank; a rank has several with an interleaved pipeline."""

    layers: int
    first: bool
    last: bool


def chunks_of_stage(arch: Architecture, layout: ParallelLayout, stage: int) -> list[Chunk]:
    """The groups of layers of a pipeline stage: layers / (PP * VPP) each, dealt out in rounds."""
    virtual = layout.virtual_pipeline
    layers = arch.num_layers // (layout.pipeline * virtual)
    last = layout.pipeline - 1
    return [
        Chunk(layers, stage == 0 and number == 0, stage == last and number == virtual - 1)
        for number in range(virtual)
    ]


def stage_layers(arch: Architecture, layout: ParallelLayout) -> int:
    """Layers of a pipeline stage, in all its chunks; every stage has the same number."""
    return arch.num_layers // layout.pipeline


def chunk_parameters(
    arch: Architecture, layout: ParallelLayout, padded_vocab: int, chunk: Chunk
) -> tuple[Parameter, ...]:
    """Of the embedding, the layers, the final norm and the head, as far as the chunk has them.

    With tied embeddings the head is the embedding; a last stage that has no embedding holds a copy of it.
    """
    rows = {row.hf[0][0]: row for row in FAMILIES[arch.family].rows if not row.in_layer}
    embedding = _parameter(arch, layout, padded_vocab, rows.pop(EMBEDDING))
    head = _parameter(arch, layout, padded_vocab, rows.pop(LM_HEAD))
    split = arch.tied_embeddings and layout.pipeline > 1
    found: list[Parameter] = []
    if chunk.first:
        found.append(Parameter(embedding.numel, False, shared_embedding=split))
    found += _layer_parameters(arch, layout) * chunk.layers
    if chunk.last:
        found += [_parameter(arch, layout, padded_vocab, row) for row in rows.values()]  # the final norm
        if not (arch.tied_embeddings and chunk.first):
            found.append(Parameter(head.numel, True, shared_embedding=split))
    return tuple(found)


@lru_cache(maxsize=64)
def stage_parameters(
    arch: Architecture, layout: ParallelLayout, padded_vocab: int, stage: int
) -> tuple[tuple[Parameter, ...], ...]:
    """The parameters of each chunk of a pipeline stage."""
    chunks = chunks_of_stage(arch, layout, stage)
    return tuple(chunk_parameters(arch, layout, padded_vocab, chunk) for chunk in chunks)


def _layer_parameters(arch: Architecture, layout: ParallelLayout) -> list[Parameter]:
    rows = [row for row in FAMILIES[arch.family].rows if row.in_layer]
    place = {name: index for index, name in enumerate(_REGISTERED)}

    def order(row: Weight) -> int:
        name = row.megatron.partition("{layer}.")[2]
        return next(index for start, index in place.items() if name.startswith(start))

    dense = sorted((row for row in rows if not row.in_expert), key=order)
    experts = [row for row in rows if row.in_expert]
    here = arch.num_experts // layout.expert if experts else 0
    return [_parameter(arch, layout, 0, row) for row in [*dense, *(experts * here)]]


def _parameter(arch: Architecture, layout: ParallelLayout, padded_vocab: int, row: Weight) -> Parameter:
    numel = row.numel(arch.dimensions | {"vocab": padded_vocab})
    if row.sharding != "replicated":
        numel //= layout.tensor
    return Parameter(numel, matrix=" " in row.hf[0][1], expert=row.in_expert)
