"""GGUF file -> Hugging Face folder: dequantised tensor by tensor, never holding the model.

Hugging Face's names come from the family's table, GGUF's names for them from the package gguf. llama.cpp orders the
rows of Llama's query and key projections for rotary pairs that are neighbours; Hugging Face wants the two halves of
each head apart, so they are put back.
"""

import json
import re
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megatron_opd.checkpoint.folders import aside_of, written_together
from megatron_opd.checkpoint.gguf_config import GgufMetadata, read_gguf_config, token_ids
from megatron_opd.checkpoint.hf_families import model_weights
from megatron_opd.checkpoint.safetensors_files import FILE_BYTES, SafetensorsFiles, TensorSpec
from megatron_opd.checkpoint.state_read import first_line
from megatron_opd.errors import UserError, check_readable
from megatron_opd.models.architecture import Architecture, read_architecture

if TYPE_CHECKING:
    import gguf

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BLOCK_BYTES = 16 * 2**20  # of float32, dequantised at once
_ROPE_FACTORS = "rope_freqs.weight"
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(.*)")


def gguf_to_hf(source: Path, target: Path, *, dtype: str = "bf16", file_bytes: int = FILE_BYTES) -> str:
    """Write the model of a GGUF file as a Hugging Face folder; returns a line saying what was stored how.

    The folder holds config.json, safetensors in `dtype` ("bf16", "fp32"), the tokenizer with its chat template and
    generation_config.json. Held in memory: the largest tensor, some blocks of 16 MiB,
    and the vocabulary as Python objects, which is a few hundred MB.

    Raises UserError when the package gguf is missing, for a file that is cut short, of an unsupported architecture,
    quantisation or tokenizer, or whose tensors are not the architecture's, and when `target` exists or cannot be
    written.
    """
    file = GgufFile(source)
    config = read_gguf_config(file.metadata, file.rope_factors(), str(DTYPES[dtype]).removeprefix("torch."))
    places = _places(_architecture(config, source), file)
    specs = [TensorSpec(name, place.shape, DTYPES[dtype]) for name, place in places.items()]
    out = SafetensorsFiles(aside_of(target), specs, file_bytes)
    with written_together(target, None, out.nbytes) as aside:
        config.save_pretrained(aside)
        out.create()
        for name, place in places.items():
            out.write(name, place.read(file, DTYPES[dtype]))
        _write_tokenizer(file, aside)
    return f"{file.describe()} -> {len(specs)} tensors in {dtype}, {out.nbytes / 1e9:.2f} GB"


def _architecture(config: PretrainedConfig, source: Path) -> Architecture:
    """As it will be read from the folder; refusals name the GGUF file."""
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        try:
            return read_architecture(folder)
        except UserError as error:
            raise UserError(str(error).replace(f"{folder}/config.json", str(source))) from None


class GgufFile:
    """An opened GGUF file: its metadata, and its tensors one at a time.

    Raises UserError, at construction, when gguf is not installed or the file is missing or not complete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = _open(path)
        self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        shapes = {name: tuple(map(int, reversed(t.shape))) for name, t in self._tensors.items()}

        def value(key: str) -> Any:
            field = reader.fields.get(key)
            return None if field is None else field.contents()

        self.metadata = GgufMetadata(str(path), value, shapes)

    def read(self, name: str, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """A tensor, or one expert's part of it. Raises UserError for an unknown quantisation.

        Besides the result some blocks of 16 MiB are held.
        """
        import gguf

        tensor = self._tensors[name]
        data = tensor.data if expert is None else tensor.data[expert]
        shape = self.metadata.shapes[name] if expert is None else self.metadata.shapes[name][1:]
        out = torch.empty(shape, dtype=dtype)
        at_once = max(1, _BLOCK_BYTES // (4 * torch.Size(shape[1:]).numel()))
        try:
            for start in range(0, shape[0], at_once):
                rows = gguf.dequantize(data[start : start + at_once], tensor.tensor_type)
                out[start : start + at_once] = torch.tensor(rows)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(f"{self.path}: {name} is quantised as {kind}, which gguf cannot read") from None
        return out

    def rope_factors(self) -> Tensor | None:
        """The divisors of the rotary frequencies, where the file has them."""
        return self.read(_ROPE_FACTORS, torch.float32) if _ROPE_FACTORS in self._tensors else None

    def describe(self) -> str:
        """Name and quantisations of the file."""
        kinds = Counter(tensor.tensor_type.name for tensor in self._tensors.values())
        return f"{self.path.name} ({', '.join(f'{n} {kind}' for kind, n in kinds.most_common())})"


def _open(path: Path) -> "gguf.GGUFReader":
    try:
        import gguf
    except ImportError:
        raise UserError(
            "reading GGUF files needs the package gguf: pip install 'megatron-opd[quickstart]'"
        ) from None
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    check_readable(path)
    try:
        return gguf.GGUFReader(str(path))
    except (
        ValueError,
        IndexError,
        KeyError,
        OSError,
    ) as error:  # the reader checks nothing: it trips over what lacks
        raise UserError(f"{path} is not a complete GGUF file ({error}): fetch it again") from None


class _Place:
    """Where a Hugging Face tensor comes from: GGUF tensor, expert, and heads whose rotary pairs have to be split."""

    def __init__(self, name: str, expert: int | None, shape: tuple[int, ...], heads: int | None) -> None:
        self.name, self.expert, self.shape, self.heads = name, expert, shape, heads

    def read(self, file: GgufFile, dtype: torch.dtype) -> Tensor:
        values = file.read(self.name, dtype, self.expert)
        return values if self.heads is None else split_rotary_pairs(values, self.heads)


def _places(arch: Architecture, file: GgufFile) -> dict[str, _Place]:
    """Hugging Face name -> where it comes from, for every tensor of the model; UserError unless they match."""
    import gguf

    architecture = file.metadata.architecture
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], arch.num_layers)
    places: dict[str, _Place] = {}
    for weight in model_weights(arch):
        for name, shape in weight.shapes(arch.dimensions).items():
            expert = _EXPERT.fullmatch(name)
            stem, _, ending = (f"{expert[1]}.{expert[3]}" if expert else name).rpartition(".")
            gguf_name = f"{names.get_name(stem)}.{ending}"
            stored = (arch.moe.num_experts, *shape) if expert and arch.moe else shape
            if file.metadata.shapes.get(gguf_name) != stored:
                found = file.metadata.shapes.get(gguf_name)
                had = "is missing" if found is None else f"has shape {list(found)}"
                raise UserError(f"{file.path}: {gguf_name} {had}, the metadata imply shape {list(stored)}")
            heads = _rotary_heads(arch, name) if architecture == "llama" else None
            places[name] = _Place(gguf_name, int(expert[2]) if expert else None, shape, heads)
    used = {place.name for place in places.values()} | {_ROPE_FACTORS}
    for gguf_name in sorted(file.metadata.shapes.keys() - used):
        raise UserError(f"{file.path}: unexpected tensor {gguf_name}, not part of this architecture")
    return places


def _rotary_heads(arch: Architecture, name: str) -> int | None:
    return {"q_proj": arch.num_heads, "k_proj": arch.num_kv_groups}.get(name.split(".")[-2])


def split_rotary_pairs(weight: Tensor, heads: int) -> Tensor:
    """[heads * hd, H] with rows (pair, half) within a head -> rows (half, pair)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _write_tokenizer(file: GgufFile, folder: Path) -> None:
    """Tokenizer, chat template and generation_config.json."""
    from transformers import AutoTokenizer

    if file.metadata.value("tokenizer.ggml.model") is None:
        raise UserError(f"{file.path} holds no tokenizer: choose a GGUF file that has one")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(file.path.parent), gguf_file=file.path.name, trust_remote_code=False
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file.path}: transformers cannot read its tokenizer ({first_line(error)})"
        ) from None
    tokenizer.save_pretrained(folder)
    ids = json.dumps(token_ids(file.metadata), indent=2)
    (folder / "generation_config.json").write_text(ids + "\n", encoding="utf-8")
