"""A model's shards -> Hugging Face tensors, one at a time, and a Hugging Face folder written from them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_opd.checkpoint.folders import written_aside
from megatron_opd.checkpoint.hf_families import (
    hf_from_shards,
    model_weights,
    stage_parameters,
)
from megatron_opd.checkpoint.safetensors_files import FILE_BYTES, SafetensorsFiles, TensorSpec
from megatron_opd.checkpoint.weights import copy_tokenizer_files, write_config
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import Architecture
from megatron_opd.models.families.rows import Weight
from megatron_opd.models.gpt import GPT


@dataclass(frozen=True)
class _Owner:
    """Who holds a parameter, and in which dtype."""

    stage: int
    expert_rank: int
    dtype: torch.dtype


@torch.no_grad()
def export_hf_tensors(
    chunks: Sequence[GPT], arch: Architecture, groups: ProcessGroupCollection
) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's Hugging Face tensors one at a time, (name, tensor), on every rank of the replica.

    With expert parallelism: on every rank of the replicas that share the experts.

    They have the parameters' dtype and device and real vocabulary rows only; tied embeddings come once. A
    tensor may share the parameter's memory: use or copy it before the next update.

    Collective over the replica's `tp`, `pp` and `ep` groups: every rank exhausts it, in step. At the start 1 object
    all-gather over `pp` and over `ep`; then for each sharded parameter 1 all-gather over `tp` (where it is held), for
    each Hugging Face tensor of an expert 1 broadcast over `ep` (on its stage), and for each Hugging Face tensor 1
    broadcast over `pp`; none in a group of one rank.
    """
    mine = stage_parameters(chunks)
    owners = _owners(mine, groups)
    device = next(chunks[0].parameters()).device
    exported: set[str] = set()
    for weight in model_weights(arch):
        shapes = weight.shapes(arch.dimensions)
        if exported.issuperset(shapes):  # the tied LM head
            continue
        exported.update(shapes)
        owner = owners[weight.megatron]
        if weight.megatron in mine and owner.stage == groups.pp.rank():
            shards = _gather_shards(weight, mine[weight.megatron], groups.tp)
            tensors = [tensor.contiguous() for tensor in hf_from_shards(weight, arch, shards)]
        else:
            tensors = [torch.empty(shape, dtype=owner.dtype, device=device) for shape in shapes.values()]
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            assert tensor.shape == shape, f"{name}: made {tensor.shape}, expected {shape}"
            if weight.expert is not None and groups.ep.size() > 1 and owner.stage == groups.pp.rank():
                dist.broadcast(tensor, group=groups.ep, group_src=owner.expert_rank)
            if groups.pp.size() > 1:
                dist.broadcast(tensor, group=groups.pp, group_src=owner.stage)
            yield name, tensor


def takes_part(groups: ProcessGroupCollection) -> bool:
    """Whether this rank is in the first replica (with experts: in the first replicas that hold all of them together).

    An export that only the first rank needs is left to these.
    """
    return groups.dp_cp.rank() < math.lcm(groups.tp.size(), groups.ep.size()) // groups.tp.size()


def _owners(mine: dict[str, torch.nn.Parameter], groups: ProcessGroupCollection) -> dict[str, _Owner]:
    """Parameter name -> the first pipeline stage and the first expert-parallel rank that hold it."""
    held = {name: _Owner(groups.pp.rank(), groups.ep.rank(), param.dtype) for name, param in mine.items()}
    for group in (groups.pp, groups.ep):
        if group.size() > 1:
            others: list[dict[str, _Owner]] = [{}] * group.size()
            dist.all_gather_object(others, held, group=group)
            held = {name: owner for part in reversed(others) for name, owner in part.items()}
    return held


def _gather_shards(weight: Weight, parameter: Tensor, tp: dist.ProcessGroup) -> list[Tensor]:
    local = parameter.detach()
    if weight.sharding == "replicated" or tp.size() == 1:
        return [local]
    shards = [torch.empty_like(local) for _ in range(tp.size())]
    dist.all_gather(shards, local, group=tp)
    return shards


def save_hf(
    chunks: Sequence[GPT],
    arch: Architecture,
    groups: ProcessGroupCollection,
    source_folder: Path,
    out_folder: Path,
    *,
    replace: bool = False,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write a Hugging Face folder that plain transformers loads: weights, config, tokenizer.

    config.json comes from `source_folder` (the folder the model was built from) with `dtype` set to the
    model's. The first rank of the first replica writes, aside first, so that `out_folder` appears when it is
    complete; with `replace` an older one gives way. Weights go into files of at most `file_bytes`, with an
    index when there are several; one tensor at a time is held beside the model.

    Collective over every rank of the model: `export_hf_tensors` in the first replica (with expert parallelism,
    in the first replicas that hold all experts together), then 2 object broadcasts. Raises UserError on every
    rank alike when `out_folder` exists or cannot be written (disk full).
    """
    error: str | None = None
    if takes_part(groups):
        tensors = export_hf_tensors(chunks, arch, groups)
        dtype = next(chunks[0].parameters()).dtype
        if groups.mp.rank() == 0 and groups.dp_cp.rank() == 0:
            try:
                with written_aside(out_folder, replace=replace) as aside:
                    write_config(source_folder, aside, dtype)
                    copy_tokenizer_files(source_folder, aside)
                    _write_safetensors(tensors, aside, dtype, arch, file_bytes)
            except UserError as failure:
                error = str(failure)
        for _ in tensors:  # ranks that do not write take part; after a failure so does the one that does
            pass
    _raise_everywhere(error, groups)


def _write_safetensors(
    tensors: Iterator[tuple[str, Tensor]],
    folder: Path,
    dtype: torch.dtype,
    arch: Architecture,
    file_bytes: int,
) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for weight in model_weights(arch):
        shapes |= weight.shapes(arch.dimensions)
    specs = [TensorSpec(name, shape, dtype) for name, shape in shapes.items()]
    files = SafetensorsFiles(folder, specs, file_bytes)
    files.create()
    for name, tensor in tensors:
        files.write(name, tensor)


def _raise_everywhere(error: str | None, groups: ProcessGroupCollection) -> None:
    """Hand the first rank's error to the rest of its replica, and from there to the other replicas."""
    message = [error]
    for group in (groups.mp, groups.dp_cp):
        dist.broadcast_object_list(message, group=group, group_src=0)
    if message[0] is not None:
        raise UserError(message[0])
