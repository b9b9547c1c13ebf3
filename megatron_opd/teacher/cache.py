"""What a teacher has said of whole sequences, as files in a folder that runs share: asked again, it costs a read.

A file has the rows of one sequence. Its name is the SHA-256 of all that they depend on: the teacher (`Source`), the
format of its payloads, the ids that it reads, and which of them it is asked about. So no file ever becomes wrong; one
that is cut short or altered is known by its checksum, deleted, and missing from then on. Files come into being by a
rename, and whoever reads or writes one needs no other: any number of runs and of their processes use a folder together.

Shapes: L ids of a sequence, R loss positions of it, N of a whole microbatch.
"""

import hashlib
import json
import secrets
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from megatron_opd.data.packing import Microbatch
from megatron_opd.errors import UserError, why_refused
from megatron_opd.teacher.payload import PayloadFormat

SUFFIX, ASIDE = ".safetensors", ".incomplete"
KEPT_WHEN_FULL = 0.9  # of the limit: making room now and then is cheaper than for every file
ABANDONED = 3600.0  # seconds after which an incomplete file is a killed process's
NAMES = {
    "hidden_states": ("hidden_states",),
    "logits": ("logits",),
    "topk": ("logprob", "ids", "ids_logprob"),
    "sampled": ("logprob",),
}
"""Of the tensors of each kind of payload, in the order of `PayloadFormat.tensors`."""
DEPENDS_ON = {
    "hidden_states": (),
    "logits": ("vocab_size",),
    "topk": ("vocab_size", "temperature", "k"),
    "sampled": ("vocab_size", "temperature"),
}
"""What else of the format the numbers of each kind depend on."""


@dataclass(frozen=True)
class Source:
    """Who speaks: the weights' fingerprint, what runs them, and what of a token is told."""

    fingerprint: str
    engine: str
    form: PayloadFormat

    @property
    def described(self) -> dict[str, str]:
        """All that a payload depends on besides the sequence, as text."""
        form = self.form
        return {
            "teacher": self.fingerprint,
            "engine": self.engine,
            "kind": form.kind,
            "dtype": str(form.dtype).removeprefix("torch."),
            "tensors": str([[*trailing, str(dtype)] for trailing, dtype in form.tensors]),
            **{name: str(getattr(form, name)) for name in DEPENDS_ON[form.kind]},
        }


@dataclass(frozen=True)
class Segment:
    """A sequence as the teacher reads it."""

    tokens_L: Tensor  # int64, prompt and response without the last id, which nothing comes after
    positions_R: Tensor  # int64, ascending: where the next id is a loss token
    targets_R: Tensor  # int64: those ids

    def key(self, source: Source) -> str:
        """The name of its file."""
        found = hashlib.sha256(json.dumps(source.described, sort_keys=True).encode())
        for tensor in (self.tokens_L, self.positions_R, self.targets_R):
            found.update(len(tensor).to_bytes(8, "little"))
            found.update(tensor.numpy().tobytes())
        return found.hexdigest()


def segments_of(microbatch: Microbatch) -> Iterator[Segment]:
    """The sequences of a whole microbatch on the CPU, in order; together they have its loss positions in order."""
    for start, end in pairwise(microbatch.cu_seqlens.tolist()):
        mask = microbatch.mask_T[start:end]
        if mask.any():
            read = ~microbatch.padding_T[start:end]
            yield Segment(
                microbatch.tokens_T[start:end][read],
                mask.nonzero()[:, 0],
                microbatch.targets_T[start:end][mask],
            )


class PayloadCache:
    """The files of `folder` that `source` has or will have; those of others are let be, until there is no room.

    The folder has about `max_bytes`, of all sources together: then the files that were written first go. `writers`
    processes of the run write, each about as much. What the disk refuses is said once, on stderr, and costs no more
    than the use of the cache. Raises UserError, at the start, for a folder that cannot be made.
    """

    def __init__(self, folder: Path, source: Source, *, max_bytes: float, writers: int = 1) -> None:
        self.source = source
        self.folder, self._max_bytes, self._writers = folder, max_bytes, writers
        self._written = 0  # since all files were last looked at
        self._held: int | None = None  # by the folder then
        self._refused = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"teacher.cache: cannot write {folder}: {why_refused(error) or error}") from None

    def read(self, segment: Segment) -> list[Tensor] | None:
        """The tensors [R, ...] of a sequence, as the format has them; None when there is no file of it."""
        path = self._path(segment)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _warn(f"cannot read {path}: {error.strerror}; the teacher is asked")
            return None
        try:
            tensors, _ = _parsed(data)
            rows = [tensors[name] for name in NAMES[self.source.form.kind]]
            self._check(rows, len(segment.positions_R))
        except (KeyError, ValueError) as error:
            _warn(f"{path} is damaged ({error}): it is deleted, and the teacher asked again")
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        return rows

    def write(self, segment: Segment, rows: Sequence[Tensor]) -> None:
        """Keep the tensors [R, ...] of a sequence, unless there is a file of it already."""
        path = self._path(segment)
        if self._refused or path.exists():
            return
        sequence = {
            "tokens": segment.tokens_L,
            "positions": segment.positions_R,
            "targets": segment.targets_R,
        }
        tensors = {name: tensor.to(torch.int32) for name, tensor in sequence.items()}
        for name, tensor, (_, dtype) in zip(
            NAMES[self.source.form.kind], rows, self.source.form.tensors, strict=True
        ):
            tensors[name] = tensor.detach().to("cpu", dtype).contiguous()
        data = save(tensors, self.source.described | {"crc32": _checksum(tensors)})
        aside = path.with_name(f".{path.stem}.{secrets.token_hex(6)}{ASIDE}")
        try:
            path.parent.mkdir(exist_ok=True)
            aside.write_bytes(data)
            aside.replace(path)
            self._make_room(len(data))
        except OSError as error:
            self._refused = True
            _warn(f"cannot write {path}: {why_refused(error) or error}; this run keeps no more there")
            with suppress(OSError):
                aside.unlink(missing_ok=True)

    def _path(self, segment: Segment) -> Path:
        key = segment.key(self.source)
        return self.folder / key[:2] / (key + SUFFIX)

    def _check(self, rows: Sequence[Tensor], count: int) -> None:
        for tensor, (trailing, dtype) in zip(rows, self.source.form.tensors, strict=True):
            if tensor.shape != (count, *trailing) or tensor.dtype != dtype:
                raise ValueError(f"{tensor.dtype} {list(tensor.shape)}, not {dtype} {[count, *trailing]}")

    def _make_room(self, size: int) -> None:
        """Delete the oldest files once there are more bytes than there may be, this run's other writers' included."""
        self._written += size
        if self._held is not None and self._held + self._written * self._writers <= self._max_bytes:
            return
        files = sorted(cached_files(self.folder))
        self._held, self._written = sum(size for _, size, _ in files), 0
        if self._held <= self._max_bytes:
            return
        for _, size, path in files:
            if self._held <= KEPT_WHEN_FULL * self._max_bytes:
                break
            path.unlink(missing_ok=True)
            self._held -= size


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and what it says of them. Raises UserError for one that is none, or damaged."""
    try:
        return _parsed(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {why_refused(error) or error.strerror}") from None
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is no whole file of a teacher's cache: {error}") from None


def _parsed(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Raises ValueError or KeyError for anything but what `write` has written."""
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except Exception as error:  # safetensors has its own, and others for odd headers
        raise ValueError(str(error)) from None
    about: dict[str, str] = header["__metadata__"]
    if about["crc32"] != _checksum(tensors):
        raise ValueError("its numbers are not those that were written")
    return tensors, about


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of all numbers, by name."""
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def cached_files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """(when it was written, bytes, path) of every whole file; what killed processes have left is deleted."""
    for inner in folder.iterdir():
        if len(inner.name) != 2 or not inner.is_dir():
            continue
        for path in inner.iterdir():
            with suppress(FileNotFoundError):  # another process makes room too
                status = path.stat()
                if path.suffix == SUFFIX:
                    yield status.st_mtime, status.st_size, path
                elif path.suffix == ASIDE and time.time() - status.st_mtime > ABANDONED:
                    path.unlink()


def _warn(line: str) -> None:
    print(f"warning: teacher.cache: {line}", file=sys.stderr, flush=True)
