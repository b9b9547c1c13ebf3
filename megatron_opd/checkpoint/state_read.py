"""Reads the `state/` of a Megatron folder tensor by tensor, without megatron-core and without a process group.

megatron-core's format is torch's distributed checkpoint: `.metadata` (a pickle) says which blocks of which tensor
lie where in the `.distcp` files, and every block is a small torch.save archive. The pickle is read by an unpickler
that knows only the classes of such metadata; of the archives only the numbers are read, straight into the result.
"""

import io
import os
import pathlib
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from megatron.core.dist_checkpointing.core import maybe_load_config
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_opd.errors import UserError, check_readable

_BLOCK_BYTES = 16 * 2**20  # read at once where rows of the file are not rows of the result

_ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (cls.__module__, cls.__qualname__): cls
        for cls in (
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.BytesStorageMetadata,
            metadata.TensorStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.TensorProperties,
            metadata.StorageMeta,
            metadata._MEM_FORMAT_ENCODING,
            filesystem._StorageInfo,
            planner.SavePlan,
            planner.WriteItem,
            planner.WriteItemType,
            planner.TensorWriteData,
        )
    },
    ("torch", "Size"): torch.Size,
    ("pathlib", "PosixPath"): pathlib.PosixPath,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}


class _MetadataUnpickler(pickle.Unpickler):
    """Refuses every class and function that checkpoint metadata has no use for."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


def read_metadata(state: Path) -> Metadata:
    """The `.metadata` of a `state/` folder; executes nothing.

    Raises UserError for a folder that is no complete checkpoint, and for pickles (`.metadata`, `common.pt`) that are
    cut short or ask for anything but plain data.
    """
    try:
        config = maybe_load_config(str(state))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{state / 'metadata.json'} cannot be read ({last_line(error)})") from None
    if config is None:
        raise UserError(f"{state} is not a complete checkpoint: it has no metadata.json")
    if config.sharded_backend != "torch_dist":
        raise UserError(f"{state}: format '{config.sharded_backend}' is not supported, only 'torch_dist' is")
    with _refused_when_broken(state / "common.pt"), (state / "common.pt").open("rb") as file:
        load_plain(file)
    with _refused_when_broken(state / ".metadata"), (state / ".metadata").open("rb") as file:
        found = _MetadataUnpickler(file).load()
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise pickle.UnpicklingError("it holds something else than a checkpoint's metadata")
    return found


@contextmanager
def _refused_when_broken(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not a complete checkpoint: it has no {path.name}") from None
    except PermissionError:
        raise UserError(f"cannot read {path}: permission denied") from None
    except Exception as error:  # damaged pickles end in errors of every kind
        raise UserError(f"{path} is not to be trusted or damaged ({first_line(error)})") from None


@contextmanager
def plain_data_only(state: Path) -> Iterator[None]:
    """While megatron-core itself loads from `state`: no pickle there may ask for anything but plain data.

    megatron-core unpickles `.metadata` and the checkpoint's small objects without restriction; the former is vetted
    here, for the latter torch is told to allow weights only. Raises UserError like `read_metadata`.
    """
    read_metadata(state)
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@dataclass(frozen=True)
class StoredTensor:
    """What the metadata says of a tensor: shape of the whole, dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class StateReader:
    """The tensors of a `state/` folder, read as slices. Holds the metadata, never data.

    Raises UserError, at construction, for what `read_metadata` refuses.
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        self._metadata = read_metadata(state)
        self._by_first: dict[str, dict[int, list[metadata.ChunkStorageMetadata]] | None] = {}

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Key -> shape and dtype of every tensor; layers (and experts) are stacked along leading dimensions."""
        return {
            key: StoredTensor(tuple(stored.size), stored.properties.dtype)
            for key, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def check_files(self, keys: Sequence[str]) -> None:
        """Raise UserError unless every block of these tensors is in its file, to its last byte. Reads no data."""
        sizes: dict[Path, int] = {}
        for key in keys:
            for chunk in self._stored(key).chunks:
                path, info = self._place(key, chunk)
                if path not in sizes:
                    sizes[path] = path.stat().st_size if path.is_file() else -1
                    if sizes[path] >= 0:
                        check_readable(path)
                if sizes[path] < 0:
                    raise UserError(f"cannot read {self.state}: the file {path.name} is missing")
                if sizes[path] < info.offset + info.length:
                    raise UserError(f"cannot read {self.state}: {path.name} ends before {key} does")

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A block of a tensor, shape `sizes`, in its dtype.

        Besides the result at most 16 MiB are held. Raises UserError for a damaged file, and for a block that the
        checkpoint does not hold entirely.
        """
        out = torch.empty(tuple(sizes), dtype=self._stored(key).properties.dtype)
        filled = 0
        for chunk in self._chunks_of(key, offsets, sizes):
            starts = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
            stops = [
                min(a + n, b + m)
                for a, n, b, m in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
                continue
            target = out[_box(starts, stops, offsets)]
            self._read_chunk(key, chunk, _box(starts, stops, chunk.offsets), target)
            filled += target.numel()
        if filled != out.numel():
            raise UserError(
                f"{self.state}: {key} is not complete: {filled} of {out.numel()} numbers are there"
            )
        return out

    def _chunks_of(
        self, key: str, offsets: Sequence[int], sizes: Sequence[int]
    ) -> Sequence[metadata.ChunkStorageMetadata]:
        """The chunks that may hold a part of this block.

        A model of many experts has thousands of chunks under one key. Where each lies in one layer (the leading
        dimension of stacked tensors), so does the block as a rule, and only that layer's chunks are looked at.
        """
        if key not in self._by_first:
            chunks = self._stored(key).chunks
            by_first: dict[int, list[metadata.ChunkStorageMetadata]] | None = None
            if all(chunk.sizes and chunk.sizes[0] == 1 for chunk in chunks):
                by_first = {}
                for chunk in chunks:
                    by_first.setdefault(chunk.offsets[0], []).append(chunk)
            self._by_first[key] = by_first
        found = self._by_first[key]
        if found is None or sizes[0] != 1:
            return self._stored(key).chunks
        return found.get(offsets[0], [])

    def _stored(self, key: str) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata)
        return stored

    def _place(self, key: str, chunk: metadata.ChunkStorageMetadata) -> tuple[Path, Any]:
        info = self._metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
        if info is None or getattr(info, "transform_descriptors", None):
            raise UserError(f"cannot read {self.state}: {key} is stored in an unknown way")
        path = self.state / info.relative_path
        if path.parent != self.state:
            raise UserError(f"cannot read {self.state}: {key} is said to lie outside of it, in {path}")
        return path, info

    def _read_chunk(
        self, key: str, chunk: metadata.ChunkStorageMetadata, part: tuple[slice, ...], target: Tensor
    ) -> None:
        path, info = self._place(key, chunk)
        try:
            with path.open("rb") as file:
                stored, start = _stored_block(file, info)
                if stored.shape != chunk.sizes or stored.dtype != target.dtype or not stored.is_contiguous():
                    raise ValueError("not the block that the metadata describes")
                _copy_part(file, start, tuple(stored.shape), part, target)
        except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"cannot read {self.state}: {key} in {path.name}: {last_line(error)}") from error


def _box(starts: list[int], stops: list[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(starts, stops, origin, strict=True))


def _stored_block(file: BinaryIO, info: Any) -> tuple[Tensor, int]:
    """A block without its data (on the meta device), and where in the file its data begins."""
    view = cast(IO[bytes], _create_file_view(cast(io.IOBase, file), info.offset, info.length))
    block = load_plain(view, "meta")
    begin = info.offset + block.untyped_storage()._checkpoint_offset
    return block, begin + block.storage_offset() * block.itemsize


def _copy_part(
    file: BinaryIO, begin: int, shape: tuple[int, ...], part: tuple[slice, ...], target: Tensor
) -> None:
    """Copy `part` of a contiguous block of this shape, whose data begins at `begin`, to `target`."""
    if len(shape) == 0:
        _fill(file, begin, target)
        return
    first, row_bytes = part[0].start, target.itemsize * torch.Size(shape[1:]).numel()
    if len(shape) > 2:  # a layer, an expert
        for index in range(first, part[0].stop):
            _copy_part(file, begin + index * row_bytes, shape[1:], part[1:], target[index - first])
        return
    whole_rows = all(piece == slice(0, size) for piece, size in zip(part[1:], shape[1:], strict=True))
    if whole_rows and target.is_contiguous():
        _fill(file, begin + first * row_bytes, target)
        return
    at_once = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(first, part[0].stop, at_once):
        stop = min(start + at_once, part[0].stop)
        rows = torch.empty(stop - start, *shape[1:], dtype=target.dtype)
        _fill(file, begin + start * row_bytes, rows)
        target[start - first : stop - first].copy_(rows[:, *part[1:]])


def _fill(file: BinaryIO, begin: int, target: Tensor) -> None:
    """Read the numbers of a contiguous tensor from the file."""
    view = target.reshape(-1).view(torch.uint8).numpy().data
    file.seek(begin)
    while len(view):
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise EOFError("the file ends too early")
        view = view[count:]


def load_plain(file: IO[bytes], device: str = "cpu") -> Any:
    """torch.load of nothing but numbers and plain data. Raises UnpicklingError, in our words, for anything else."""
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(_what_it_asks_for(str(error))) from None


def _what_it_asks_for(text: str) -> str:
    """torch's refusal of a pickle without the advice to load it all the same."""
    asked = re.search(r"GLOBAL (\S+)", text)
    return f"it asks for {asked[1]}, which no checkpoint needs" if asked else "it is no pickle of plain data"


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def last_line(error: BaseException) -> str:
    """The cause in one line: torch's checkpoint errors list every rank's traceback, then the cause."""
    if "weights_only" in str(error):
        return _what_it_asks_for(str(error))
    return str(error).strip().rpartition("\n")[2] or type(error).__name__
