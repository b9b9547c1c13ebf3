"""Which weights a model folder holds: a checksum of all of them, remembered as long as the files are not written to."""

import hashlib
import json
import secrets
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from megatron_opd.checkpoint.checksums import checksum
from megatron_opd.checkpoint.weights import STATE

FINGERPRINTS = "fingerprints.json"  # of files that were read before
LONG = 10 << 30  # bytes whose reading takes long enough to be told


def fingerprint(folder: Path, known: Path | None = None) -> str:
    """SHA-256 of the configuration and of the checksum of every file of weights.

    Path and times do not matter, so copies are the same model. `known` is a file that remembers the checksums by path,
    inode, size and times of the last change; without it, or where it cannot be read or written, all is read
    again. Raises OSError.
    """
    found = hashlib.sha256((folder / "config.json").read_bytes())
    sums = {} if known is None else _remembered(known)
    files = {
        path: _state(path) for path in weight_files(folder)
    }  # before it is read: a later change is another state
    unknown = [path for path, state in files.items() if state not in sums]
    size = sum(path.stat().st_size for path in unknown)
    if size >= LONG:
        print(f"{folder}: reading {size / 1e9:.0f} GB to know the teacher by", file=sys.stderr)
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        sums |= zip([files[path] for path in unknown], pool.map(checksum, unknown), strict=True)
    for state in files.values():
        found.update(sums[state].encode())
    if known is not None and unknown:
        _remember(known, sums)
    return found.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Of a Hugging Face or a Megatron folder, sorted; none where only the configuration is there."""
    state = (path for path in (folder / STATE).rglob("*") if path.is_file())
    return sorted([*folder.glob("*.safetensors"), *state])


def _state(path: Path) -> str:
    """Another after every change of the file; a copy that keeps the time of the last change has another ctime."""
    now = path.stat()
    return f"{path.resolve()} {now.st_ino} {now.st_size} {now.st_mtime_ns} {now.st_ctime_ns}"


def _remembered(known: Path) -> dict[str, str]:
    try:
        sums = json.loads(known.read_text())
        return {state: found for state, found in sums.items() if isinstance(found, str)}
    except (OSError, ValueError, AttributeError):
        return {}


def _remember(known: Path, sums: dict[str, str]) -> None:
    """By a rename; what another run has written meanwhile is lost, and read again."""
    aside = known.with_name(f".{known.name}.{secrets.token_hex(6)}")
    with suppress(OSError):
        known.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(sums, indent=1))
        aside.replace(known)
