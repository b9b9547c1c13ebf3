"""Hugging Face safetensors -> a model's shards: only this rank's slices are read, one tensor at a time.

Files are memory-mapped, the whole model is never held. Every mistake in a folder is a UserError that names
the file and the tensor.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_opd.checkpoint.hf_families import (
    model_weights,
    shard_from_hf,
    stage_parameters,
)
from megatron_opd.checkpoint.safetensors_files import DTYPES, INDEX_FILE, SINGLE_FILE
from megatron_opd.errors import UserError, check_readable
from megatron_opd.models.architecture import Architecture
from megatron_opd.models.families.rows import EMBEDDING, LM_HEAD
from megatron_opd.models.gpt import GPT


@torch.no_grad()
def load_hf_weights(
    chunks: Sequence[GPT],
    arch: Architecture,
    folder: Path,
    *,
    tp_rank: int,
    tp_size: int,
    padded_vocab_size: int,
) -> None:
    """Fill this rank's parameters from a Hugging Face folder, cast to their dtype. No collectives.

    Only this shard's rows or columns are read. Rows of the padded vocabulary beyond the real one become zero.
    With tied embeddings the last pipeline stage's copy is filled from the same tensor.

    Raises UserError, on every rank alike, for a missing or cut file and for a missing, misshapen or
    unexpected tensor.
    """
    reader = HfReader(folder)
    check_hf_weights(reader, arch)
    rows = {weight.megatron: weight for weight in model_weights(arch)}
    for name, parameter in stage_parameters(chunks).items():
        shard = shard_from_hf(
            rows[name],
            arch,
            reader.read,
            tp_rank=tp_rank,
            tp_size=tp_size,
            padded_vocab_size=padded_vocab_size,
        )
        assert shard.shape == parameter.shape, f"{name}: made {shard.shape}, the model has {parameter.shape}"
        parameter.copy_(shard)


class HfReader:
    """The tensors of a folder: in `model.safetensors`, or in the files of `model.safetensors.index.json`.

    Where there are both the index is not looked at, as in transformers. Opening reads the headers only. Raises
    UserError for a folder without safetensors, a missing or cut file, and an index that names a tensor its file lacks.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        weight_map: dict[str, str] = {}
        if (folder / SINGLE_FILE).is_file():
            paths = [folder / SINGLE_FILE]
        elif (folder / INDEX_FILE).is_file():
            weight_map = _read_index(folder / INDEX_FILE)
            paths = [folder / name for name in sorted(set(weight_map.values()))]
        else:
            raise UserError(
                f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there (weights in pickles are "
                "not read: save the model as safetensors)"
            )
        self._files = {path: _open(path) for path in paths}
        self._file_of: dict[str, Path] = {}
        for path, file in self._files.items():
            self._file_of |= dict.fromkeys(file.keys(), path)
        for name, file_name in weight_map.items():
            if self._file_of.get(name) != folder / file_name:
                raise UserError(f"{folder / file_name} lacks the tensor {name} that {INDEX_FILE} puts there")

    @property
    def names(self) -> set[str]:
        """Names of all tensors in the folder."""
        return set(self._file_of)

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Entries `start` to `stop` along `dim` (0 or 1) of a tensor, in the dtype of the file."""
        part = self._slice(name)
        return part[start:stop] if dim == 0 else part[:, start:stop]

    def dtype(self, name: str) -> str:
        """The tensor's dtype in safetensors' spelling: "F32", "BF16", "F16", ..."""
        return str(self._slice(name).get_dtype())

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self._slice(name).get_shape())

    def check(self, expected: Mapping[str, tuple[int, ...]], *, optional: set[str]) -> None:
        """Compare names and shapes with what the architecture needs; reads headers only.

        Raises UserError for the first missing, misshapen, quantized or unexpected tensor; `optional` ones may
        be there.
        """
        for name, shape in expected.items():
            if name not in self._file_of:
                raise UserError(f"{self.folder} lacks the tensor {name} that its config.json calls for")
            where, found, dtype = self._file_of[name], self.shape(name), self.dtype(name)
            if found != shape:
                raise UserError(f"{where}: {name} has shape {list(found)}, config.json implies {list(shape)}")
            if dtype not in DTYPES:
                raise UserError(f"{where}: {name} is stored as {dtype}, not in fp32, bf16 or fp16")
        for name in sorted(self.names - set(expected) - optional):
            raise UserError(f"{self._file_of[name]}: unexpected tensor {name}, not part of this architecture")

    def _slice(self, name: str) -> Any:
        return self._files[self._file_of[name]].get_slice(name)


def check_hf_weights(reader: HfReader, arch: Architecture) -> None:
    """Raise UserError unless the folder holds exactly the architecture's tensors.

    Tolerated: the rotary frequencies that old exports saved, and with tied embeddings an equal copy of the
    embedding as `lm_head.weight`. Reads headers only, and the two tensors where there is such a copy.
    """
    optional = {name for name in reader.names if name.endswith("rotary_emb.inv_freq")}
    expected: dict[str, tuple[int, ...]] = {}
    for weight in model_weights(arch):
        expected |= weight.shapes(arch.dimensions)
    copied = arch.tied_embeddings and LM_HEAD in reader.names
    if copied:
        expected[LM_HEAD] = expected[EMBEDDING]
    reader.check(expected, optional=optional)
    if copied:
        _check_tied(reader, arch.vocab_size)


def _check_tied(reader: HfReader, vocab_size: int, rows_at_once: int = 4096) -> None:
    for start in range(0, vocab_size, rows_at_once):
        stop = min(start + rows_at_once, vocab_size)
        if not torch.equal(reader.read(LM_HEAD, 0, start, stop), reader.read(EMBEDDING, 0, start, stop)):
            raise UserError(
                f"{reader.folder}: {LM_HEAD} differs from {EMBEDDING} although config.json ties them: "
                "set tie_word_embeddings to false there"
            )


def _open(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"weight file missing: {path}")
    check_readable(path)
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}): fetch it again") from None


def _read_index(path: Path) -> dict[str, str]:
    try:
        check_readable(path)
        weight_map = dict(json.loads(path.read_text())["weight_map"])
        if not all(isinstance(file_name, str) for file_name in weight_map.values()):
            raise ValueError("a file name that is no text")
        return weight_map
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a safetensors index: it holds no weight_map") from None
