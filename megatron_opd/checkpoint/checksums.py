"""Checksums of the files of a Megatron folder: recorded when it is written, compared when it is read.

`checksums.json` in the folder maps files, by their path inside it, to their SHA-256. A run's checkpoint lists all its
files, a converted folder those of `state/`: what else is in it is text that people may change.
"""

import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_opd.checkpoint.pieces import shares
from megatron_opd.errors import UserError

CHECKSUMS = "checksums.json"
_BLOCK_BYTES = 4 * 2**20


def checksum(path: Path, count: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file, of which 4 MiB at a time is held; `count` is called with the bytes just read."""
    found, block = hashlib.sha256(), bytearray(_BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            found.update(memoryview(block)[:size])
            if count is not None:
                count(size)
    return found.hexdigest()


class HashedFile(io.BufferedWriter):
    """A new file, written from its first byte to its last, and the SHA-256 of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self._hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Append bytes."""
        self._hash.update(data)
        return super().write(data)

    @property
    def checksum(self) -> str:
        """SHA-256 of what was written so far."""
        return self._hash.hexdigest()


def write_checksums(folder: Path, files: Iterable[Path], known: Mapping[Path, str] | None = None) -> None:
    """Record the checksums of these files of `folder`; those in `known` are not read again."""
    known = known or {}
    sums = {
        str(path.relative_to(folder)): known.get(path) or checksum(path)
        for path in sorted(files)
        if path.is_file()
    }
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))


def first_damaged_file(folder: Path) -> str | None:
    """The first file of a checkpoint that is missing or differs from its checksum, None when all are intact."""
    try:
        sums = _read(folder)
    except (OSError, ValueError):
        return CHECKSUMS
    return next((name for name, expected in sums.items() if _damage(folder / name, expected)), None)


class StateChecksums:
    """What is recorded of the files in `state` of a Megatron folder; nothing, in a folder of an older version.

    Raises UserError, at construction, for a `checksums.json` that cannot be read.
    """

    def __init__(self, state: Path) -> None:
        self._folder = state.parent
        try:
            sums = _read(self._folder)
        except FileNotFoundError:
            sums = {}
        except (OSError, ValueError) as error:
            raise UserError(f"{self._folder / CHECKSUMS} cannot be read ({error})") from None
        inside = {self._folder / name: expected for name, expected in sums.items()}
        self._sums = {path: expected for path, expected in inside.items() if path.parent == state}
        self._unrecorded = sorted({path for path in state.iterdir() if path.is_file()} - self._sums.keys())
        self._sizes = [path.stat().st_size if path.is_file() else 0 for path in self._sums]

    @property
    def files(self) -> int:
        """How many files are recorded."""
        return len(self._sums)

    @property
    def nbytes(self) -> int:
        """What a check reads, all processes together."""
        return sum(self._sizes)

    def check(
        self, group: dist.ProcessGroup | None = None, count: Callable[[int], object] | None = None
    ) -> None:
        """Read this process's share of the files, which are dealt out by size, and compare. No collectives.

        `count` is called with the bytes just read. Where nothing is recorded the first process says so on stderr.
        Raises UserError for the first file that is missing, differs or is not recorded beside others.
        """
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        if self._unrecorded and (self._folder / CHECKSUMS).exists():
            raise UserError(
                f"{self._unrecorded[0]} is not in {CHECKSUMS} beside it: convert or copy the folder again"
            )
        if not self._sums and rank == 0:
            print(
                f"note: {self._folder} has no {CHECKSUMS}, being of an older version: damaged numbers are not noticed",
                file=sys.stderr,
            )
        recorded = list(self._sums.items())
        for index in shares(self._sizes, size)[rank]:
            path, expected = recorded[index]
            damage = _damage(path, expected, count)
            if damage:
                raise UserError(f"{path} is damaged: {damage}; convert or copy the folder again")


def _read(folder: Path) -> dict[str, str]:
    """Raises OSError, and ValueError for a file that holds something else."""
    sums = json.loads((folder / CHECKSUMS).read_text())
    if not isinstance(sums, dict) or not all(isinstance(expected, str) for expected in sums.values()):
        raise ValueError("no checksums in it")
    return sums


def _damage(path: Path, expected: str, count: Callable[[int], object] | None = None) -> str:
    """Nothing when the file is intact."""
    if not path.is_file():
        return "it is missing"
    return "" if checksum(path, count) == expected else f"its SHA-256 is not the one in {CHECKSUMS}"
