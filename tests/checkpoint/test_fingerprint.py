"""The fingerprint of a model folder: the same for copies, another for other weights or another configuration."""

import shutil
from pathlib import Path

import pytest

from megatron_opd.checkpoint.fingerprint import BLOCK_BYTES, BLOCKS, fingerprint, weight_files
from tests.tiny import save_tiny_model


def test_copies_are_alike_and_other_weights_are_not(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "one", seed=1)
    save_tiny_model(tmp_path / "two", seed=2)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text("{}")
    found = {name: fingerprint(tmp_path / name) for name in ("one", "two", "copy")}
    assert found["one"] == found["copy"] != found["two"]
    config = tmp_path / "copy" / "config.json"
    config.write_text(config.read_text().replace("10000.0", "10001.0"))
    assert fingerprint(tmp_path / "copy") != found["one"]


@pytest.mark.parametrize("name", ["model.safetensors", "state/__0_0.distcp"])
def test_blocks_of_large_files_from_the_first_byte_to_the_last(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    size = 4 * BLOCKS * BLOCK_BYTES + 17
    path.write_bytes(bytes(size))
    assert weight_files(tmp_path) == [path]
    seen = {fingerprint(tmp_path)}
    for place in (0, size // 2 // BLOCK_BYTES * BLOCK_BYTES, size - 1):
        with path.open("r+b") as file:
            file.seek(max(0, place - 4 * BLOCK_BYTES))
            file.write(
                b"\1" * min(size - place, 8 * BLOCK_BYTES)
                if place < size - 1
                else b"\1" * (4 * BLOCK_BYTES + 1)
            )
        seen.add(fingerprint(tmp_path))
    path.write_bytes(bytes(size + 1))
    seen.add(fingerprint(tmp_path))
    assert len(seen) == 5
