"""Fill a model from a model folder of either kind, and the files beside the weights.

A Hugging Face folder holds config.json, safetensors and tokenizer files. A Megatron folder (a converted
model, or a checkpoint of a run) holds the same config.json and tokenizer files and `state/`, megatron's
dist_checkpointing format, which loads at any layout.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint.api import CheckpointException

from megatron_opd.checkpoint.hf_import import load_hf_weights
from megatron_opd.checkpoint.state_read import StateReader, last_line, plain_data_only
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import Architecture, read_config_json
from megatron_opd.models.gpt import GPT

STATE = "state"
"""Subfolder of a Megatron folder that holds the weights."""

TEACHER_PREFIX = "teacher."
"""Before the names of a teacher's weights, where a run's checkpoint holds some."""

_TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "generation_config.json",
)


def is_megatron_folder(folder: Path) -> bool:
    """Whether the folder holds megatron weights (a converted model, or a checkpoint of a run)."""
    return (folder / STATE).is_dir()


def tokenizer_files(folder: Path) -> list[Path]:
    """Tokenizer, chat template and generation defaults, as far as the folder has them.

    Raises UserError for a directory of such a name, and for a link that leads nowhere.
    """
    paths = sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)})
    for path in paths:
        if not path.is_file():
            found = "a directory, not a file" if path.is_dir() else "a link to a file that is not there"
            raise UserError(f"{path} is {found}: remove it, or put the model's file there")
    return paths


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copy the `tokenizer_files`. Raises UserError as they do."""
    for path in tokenizer_files(source):
        shutil.copyfile(path, target / path.name)


def copy_model_files(source: Path, target: Path) -> None:
    """Copy everything of a model folder that is not weights: config.json and the tokenizer files."""
    shutil.copyfile(source / "config.json", target / "config.json")
    copy_tokenizer_files(source, target)


def write_config(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write the config.json of `source` to `target` with its `dtype` changed."""
    config = read_config_json(source)
    config.pop("torch_dtype", None)  # the older name of the same key
    config["dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_model_weights(
    chunks: Sequence[GPT],
    arch: Architecture,
    folder: Path,
    *,
    groups: ProcessGroupCollection,
    padded_vocab_size: int,
) -> None:
    """Fill this rank's parameters from a Hugging Face or a Megatron folder, cast to their dtype.

    A Megatron folder may have been written at any layout and vocabulary padding, and may hold an optimizer
    too; only the model's tensors are read. Rows of the padded vocabulary beyond those in the folder become
    zero. Collectives: none for a Hugging Face folder; megatron's load of a Megatron folder spans WORLD.

    Raises UserError for weights that are missing, cut short or do not fit the architecture.
    """
    if is_megatron_folder(folder):
        load_megatron_weights(chunks, arch, folder, groups)
    else:
        load_hf_weights(
            chunks,
            arch,
            folder,
            tp_rank=groups.tp.rank(),
            tp_size=groups.tp.size(),
            padded_vocab_size=padded_vocab_size,
        )


@torch.no_grad()
def load_megatron_weights(
    chunks: Sequence[GPT], arch: Architecture, folder: Path, groups: ProcessGroupCollection
) -> None:
    """Fill this rank's parameters from the `state/` of a Megatron folder. Collective over WORLD.

    Names and shapes are checked first, from the checkpoint's metadata, by every rank alike.
    """
    state = sharded_weights(chunks, {"dp_cp_group": groups.dp_cp})
    for tensors in state.values():
        _check_state(tensors, arch, folder)
    try:
        with plain_data_only(folder / STATE):
            loaded = dist_checkpointing.load(state, str(folder / STATE))
    except (CheckpointException, CheckpointingException, OSError, RuntimeError, UnpicklingError) as error:
        raise UserError(f"cannot read {folder / STATE}: {last_line(error)}") from error
    load_chunks(chunks, loaded)


def join_load(folder: Path) -> None:
    """What a rank without a part of the model does while others load it from a Megatron folder. Collective over WORLD.

    Nothing where it is a Hugging Face folder, which is read without collectives.
    """
    if is_megatron_folder(folder):
        with plain_data_only(folder / STATE):
            dist_checkpointing.load({}, str(folder / STATE))


def sharded_weights(chunks: Sequence[GPT], metadata: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The chunks as megatron's sharded state dicts, {"model0": ..., "model1": ...}.

    What is written knows no chunks: the keys of the tensors are those of the whole model.
    """
    return {
        f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)
    }


def load_chunks(chunks: Sequence[GPT], loaded: dict[str, Any]) -> None:
    """Fill the chunks from what `dist_checkpointing.load` made of `sharded_weights`."""
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{index}"])


def _check_state(
    wanted: dict[str, ShardedTensor | ShardedTensorFactory], arch: Architecture, folder: Path
) -> None:
    found = StateReader(folder / STATE).tensors
    for entry in wanted.values():
        for tensor in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            if not isinstance(tensor, ShardedTensor):
                continue
            if tensor.key not in found:
                raise UserError(f"{folder / STATE} lacks the tensor {tensor.key} that config.json calls for")
            shape, implied = found[tensor.key].shape, tensor.global_shape
            padded = tensor.allow_shape_mismatch and shape[0] >= arch.vocab_size and shape[1:] == implied[1:]
            if shape != implied and not padded:
                sizes = f"has shape {list(shape)}, config.json implies {list(implied)}"
                raise UserError(f"{folder / STATE}: {tensor.key} {sizes}")
