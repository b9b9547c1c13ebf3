"""Writes safetensors files tensor by tensor: names, shapes and dtypes are known first, the numbers come one at a time.

So the headers are written first, and every tensor goes straight to its place, in any order and from any process.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
FILE_BYTES = 2 * 10**9
"""Largest size of a safetensors file (a tensor larger than that has a file to itself)."""

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""safetensors' name of each supported dtype."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK_BYTES = 16 * 2**20  # what is copied at once, where a tensor has to be cast or fetched from a GPU


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class SafetensorsFiles:
    """`model.safetensors` in `folder`, or several files with an index when the tensors exceed `file_bytes`.

    One process calls `create`, then any process of the same plan calls `write`, each tensor once.
    """

    def __init__(self, folder: Path, specs: Sequence[TensorSpec], file_bytes: int = FILE_BYTES) -> None:
        self._folder = folder
        self._specs = {spec.name: spec for spec in specs}
        files = _divide(specs, file_bytes)
        names = [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
        self._files = dict(zip(names if len(files) > 1 else [SINGLE_FILE], files, strict=True))
        self._headers = {name: _header(file) for name, file in self._files.items()}
        self._places: dict[str, tuple[Path, int]] = {}  # tensor -> file, first byte
        for name, file in self._files.items():
            start = len(self._headers[name])
            for spec in file:
                self._places[spec.name] = (folder / name, start)
                start += spec.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes that all the files together will take."""
        return sum(map(len, self._headers.values())) + sum(spec.nbytes for spec in self._specs.values())

    def create(self) -> None:
        """Write the headers and the index, and give every file its full size. Raises OSError."""
        for name, file in self._files.items():
            header = self._headers[name]
            with (self._folder / name).open("wb") as out:
                out.write(header)
                out.truncate(len(header) + sum(spec.nbytes for spec in file))
        if len(self._files) > 1:
            weight_map = {spec.name: name for name, file in self._files.items() for spec in file}
            total = sum(spec.nbytes for spec in self._specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor, on any device, into its place, cast to the dtype of its spec. Raises OSError.

        At most 16 MiB beside the tensor are held (and a copy of it when it is not contiguous).
        """
        spec = self._specs[name]
        assert tensor.shape == spec.shape, f"{name}: got {tensor.shape}, announced {spec.shape}"
        path, start = self._places[name]
        with path.open("r+b", buffering=0) as file:
            file.seek(start)
            for block in tensor.detach().reshape(-1).split(_BLOCK_BYTES // spec.dtype.itemsize):
                data = block.to("cpu", spec.dtype).view(torch.uint8).numpy().data
                while len(data):
                    data = data[file.write(data) :]


def _divide(specs: Sequence[TensorSpec], file_bytes: int) -> list[list[TensorSpec]]:
    """The tensors of each file, in the order given, except that within a file wider numbers come first: aligned."""
    files: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if files[-1] and size + spec.nbytes > file_bytes:
            files.append([])
            size = 0
        files[-1].append(spec)
        size += spec.nbytes
    return [sorted(file, key=lambda spec: -spec.dtype.itemsize) for file in files]


def _header(specs: Sequence[TensorSpec]) -> bytes:
    """Length of the header in 8 bytes, then JSON, padded so that the numbers begin at a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for spec in specs:
        stop = start + spec.nbytes
        entries[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
