"""Hugging Face folder -> Megatron folder and back, in one process (the result loads at any layout).

megatron-core's checkpoint writer starts a helper process that imports the main script again, so a script that
calls `hf_to_megatron` needs an `if __name__ == "__main__"` guard.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opd.checkpoint.folders import written_aside
from megatron_opd.checkpoint.hf_export import save_hf
from megatron_opd.checkpoint.hf_import import HfReader
from megatron_opd.checkpoint.weights import (
    STATE,
    copy_model_files,
    is_megatron_folder,
    load_model_weights,
    state_shapes,
)
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import Architecture, read_architecture
from megatron_opd.models.gpt import GPT, build_gpt
from megatron_opd.parallel import cpu
from megatron_opd.parallel.groups import ParallelLayout, build_groups


def hf_to_megatron(source: Path, target: Path) -> None:
    """Write the Hugging Face folder `source` as a Megatron folder `target`.

    The weights keep their dtype: bf16 stays bf16, everything else is stored in fp32, which holds it exactly.
    Raises UserError for anything wrong with `source`, and when `target` exists or cannot be written.
    """
    arch = read_architecture(source)
    if is_megatron_folder(source):
        raise UserError(f"{source} is a Megatron folder already")
    reader = HfReader(source)
    precision = "bf16" if {reader.dtype(name) for name in reader.names} == {"BF16"} else "fp32"
    with written_aside(target) as aside, single_process_groups() as groups:
        model = _load(arch, source, groups, precision)
        copy_model_files(source, aside)
        (aside / STATE).mkdir()
        state = {"model": model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})}
        dist_checkpointing.save(state, str(aside / STATE))


def megatron_to_hf(source: Path, target: Path) -> None:
    """Write a Megatron folder (a converted model or a checkpoint of a run) as a Hugging Face folder `target`.

    The weights keep the dtype they have in `source`. Raises UserError for anything wrong with `source`, and
    when `target` exists or cannot be written.
    """
    arch = read_architecture(source)
    if not is_megatron_folder(source):
        raise UserError(f"{source} is not a Megatron folder: it has no {STATE}/")
    cpu.install()
    embedding = state_shapes(source).get("embedding.word_embeddings.weight")
    precision = "bf16" if embedding is not None and embedding.dtype == torch.bfloat16 else "fp32"
    with single_process_groups() as groups:
        save_hf(_load(arch, source, groups, precision), arch, groups, source, target)


def _load(arch: Architecture, folder: Path, groups: ProcessGroupCollection, precision: str) -> GPT:
    padded = arch.padded_vocab_size(1)
    model = build_gpt(arch, ParallelLayout(), groups, precision=precision, padded_vocab_size=padded)
    load_model_weights(model, arch, folder, groups=groups, padded_vocab_size=padded)
    return model


@contextmanager
def single_process_groups() -> Iterator[ProcessGroupCollection]:
    """Groups of one rank. megatron's checkpoints need process groups even so; gloo here, without a port."""
    cpu.install()
    joined = dist.is_initialized()
    if not joined:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.get_world_size() == 1, "conversion runs in one process"
    try:
        yield build_groups(ParallelLayout())
    finally:
        if not joined:
            dist.destroy_process_group()
