"""The LM head alone of a model folder of either kind, cut for a layout that the rest of the model does not have.

Whoever is given a teacher's hidden states projects them with it.
"""

from pathlib import Path

import torch
from torch import Tensor

from megatron_opd.checkpoint.hf_families import ReadSlice, model_weights, shard_from_hf, stored_at
from megatron_opd.checkpoint.hf_import import HfReader, check_hf_weights
from megatron_opd.checkpoint.state_read import StateReader
from megatron_opd.checkpoint.weights import STATE, is_megatron_folder
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import Architecture
from megatron_opd.models.families.rows import FIRST, Weight


def load_head(
    folder: Path,
    arch: Architecture,
    *,
    tp_rank: int,
    tp_size: int,
    padded_vocab_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows [padded_vocab_size / tp_size, H] of the LM head, tied or not; those beyond the real vocabulary are zero.

    Only these rows are read. No collectives. Raises UserError for a folder that lacks the head or has another shape.
    """
    if arch.tied_embeddings:
        weight = FIRST
    else:
        weight = next(row for row in model_weights(arch) if row.megatron == "output_layer.weight")
    if is_megatron_folder(folder):
        read = _stored_rows(folder, arch, weight)
    else:
        reader = HfReader(folder)
        check_hf_weights(reader, arch)
        read = reader.read
    shard = shard_from_hf(
        weight, arch, read, tp_rank=tp_rank, tp_size=tp_size, padded_vocab_size=padded_vocab_size
    )
    return shard.to(dtype)


def _stored_rows(folder: Path, arch: Architecture, weight: Weight) -> ReadSlice:
    """Reads rows of the parameter from `state/`, which may have been padded otherwise."""
    reader = StateReader(folder / STATE)
    key, _ = stored_at(weight, arch)
    if key not in reader.tensors:
        raise UserError(f"{folder / STATE} lacks the tensor {key} that config.json calls for")
    rows, width = reader.tensors[key].shape
    if rows < arch.vocab_size or width != arch.hidden_size:
        raise UserError(
            f"{folder / STATE}: {key} has shape {[rows, width]}, config.json implies "
            f"{[arch.vocab_size, arch.hidden_size]}"
        )

    def read(name: str, dim: int, start: int, stop: int) -> Tensor:
        assert dim == 0, name
        return reader.read(key, (start, 0), (stop - start, width))

    return read
