"""A model's shards -> Hugging Face tensors, one at a time, and a Hugging Face folder written from them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors.torch import save_file
from torch import Tensor

from megatron_opd.checkpoint.folders import written_aside
from megatron_opd.checkpoint.hf_families import (
    Weight,
    hf_from_shards,
    hf_shapes,
    model_weights,
    stage_parameters,
)
from megatron_opd.checkpoint.hf_import import INDEX_FILE, SINGLE_FILE
from megatron_opd.checkpoint.weights import copy_tokenizer_files
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import Architecture, read_config_json
from megatron_opd.models.gpt import GPT

FILE_BYTES = 2 * 10**9
"""Largest size of an exported safetensors file (a tensor larger than that has a file to itself)."""


@torch.no_grad()
def export_hf_tensors(
    model: GPT, arch: Architecture, groups: ProcessGroupCollection
) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's Hugging Face tensors one at a time, (name, tensor), on every rank of the replica.

    They have the parameters' dtype and device and real vocabulary rows only; tied embeddings come once. A
    tensor may share the parameter's memory: use or copy it before the next update.

    Collective over the replica's `tp` and `pp` groups: every rank exhausts it, in step. At the start 1 object
    all-gather over `pp`; then for each sharded parameter 1 all-gather over `tp` (on the stage that has it)
    and for each Hugging Face tensor 1 broadcast over `pp`; none in a group of one rank.
    """
    mine = stage_parameters(model)
    device = next(model.parameters()).device
    owners = _owners(mine, groups.pp)
    exported: set[str] = set()
    for weight in model_weights(arch):
        shapes = hf_shapes(weight, arch)
        if exported.issuperset(shapes):  # the tied LM head
            continue
        exported.update(shapes)
        stage, dtype = owners[weight.megatron]
        if stage == groups.pp.rank():
            shards = _gather_shards(weight, mine[weight.megatron], groups.tp)
            tensors = [tensor.contiguous() for tensor in hf_from_shards(weight, arch, shards)]
        else:
            tensors = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes.values()]
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            assert tensor.shape == shape, f"{name}: made {tensor.shape}, expected {shape}"
            if groups.pp.size() > 1:
                dist.broadcast(tensor, group=groups.pp, group_src=stage)
            yield name, tensor


def _owners(mine: dict[str, torch.nn.Parameter], pp: dist.ProcessGroup) -> dict[str, tuple[int, torch.dtype]]:
    """Parameter name -> (first pipeline stage that has it, dtype)."""
    dtypes = {name: parameter.dtype for name, parameter in mine.items()}
    stages: list[dict[str, torch.dtype]] = [dtypes] * pp.size()
    if pp.size() > 1:
        dist.all_gather_object(stages, dtypes, group=pp)
    return {
        name: (stage, dtype)
        for stage in reversed(range(len(stages)))
        for name, dtype in stages[stage].items()
    }


def _gather_shards(weight: Weight, parameter: Tensor, tp: dist.ProcessGroup) -> list[Tensor]:
    local = parameter.detach()
    if weight.sharding == "replicated" or tp.size() == 1:
        return [local]
    shards = [torch.empty_like(local) for _ in range(tp.size())]
    dist.all_gather(shards, local, group=tp)
    return shards


def save_hf(
    model: GPT,
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
    index when there are several; that much is held in memory.

    Collective over every rank of the model: `export_hf_tensors` in the first replica, then 2 object
    broadcasts. Raises UserError on every rank alike when `out_folder` exists or cannot be written (disk
    full).
    """
    error: str | None = None
    if groups.dp_cp.rank() == 0:
        tensors = export_hf_tensors(model, arch, groups)
        if groups.mp.rank() == 0:
            try:
                with written_aside(out_folder, replace=replace) as aside:
                    _write_config(source_folder, aside, next(model.parameters()).dtype)
                    copy_tokenizer_files(source_folder, aside)
                    _write_safetensors(tensors, aside, file_bytes)
            except UserError as failure:
                error = str(failure)
        for _ in tensors:  # ranks that do not write take part; after a failure so does the one that does
            pass
    _raise_everywhere(error, groups)


def _raise_everywhere(error: str | None, groups: ProcessGroupCollection) -> None:
    """Hand the first rank's error to the rest of its replica, and from there to the other replicas."""
    message = [error]
    for group in (groups.mp, groups.dp_cp):
        dist.broadcast_object_list(message, group=group, group_src=0)
    if message[0] is not None:
        raise UserError(message[0])


def _write_config(source: Path, target: Path, dtype: torch.dtype) -> None:
    config = read_config_json(source)
    config.pop("torch_dtype", None)  # the older name of the same key
    config["dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_safetensors(tensors: Iterator[tuple[str, Tensor]], folder: Path, file_bytes: int) -> None:
    files: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total_bytes = 0

    def flush() -> None:
        part = folder / f"{len(files)}.part"
        save_file(pending, part, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", part)  # safetensors lets only the owner read
        files.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and sum(other.nbytes for other in pending.values()) + tensor.nbytes > file_bytes:
            flush()
        pending[name] = tensor.cpu()
        total_bytes += tensor.nbytes
    flush()
    if len(files) == 1:
        (folder / "0.part").rename(folder / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file_name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
