"""Which weights a model folder holds, told apart without reading all of them."""

import hashlib
from pathlib import Path

from megatron_opd.checkpoint.weights import STATE

BLOCKS, BLOCK_BYTES = 256, 4096  # of each file


def fingerprint(folder: Path) -> str:
    """SHA-256 of the configuration and of every file of weights: its size, and blocks of it from beginning to end.

    Of a file of 2 GB a block every 8 MB; files of up to 1 MB are read whole. Path and times do not matter, so copies
    are the same model. Raises OSError.
    """
    found = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        with path.open("rb", buffering=0) as file:
            size = file.seek(0, 2)
            found.update(size.to_bytes(8, "little"))
            blocks = min(BLOCKS, -(-size // BLOCK_BYTES))
            for block in range(blocks):
                file.seek(max(0, size - BLOCK_BYTES) * block // max(1, blocks - 1))
                found.update(file.read(BLOCK_BYTES))
    return found.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Of a Hugging Face or a Megatron folder, sorted; none where only the configuration is there."""
    state = (path for path in (folder / STATE).rglob("*") if path.is_file())
    return sorted([*folder.glob("*.safetensors"), *state])
