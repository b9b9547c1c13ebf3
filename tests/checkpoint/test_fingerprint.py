"""The fingerprint of a model folder: the same for copies, another for other weights or another configuration."""

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_opd.checkpoint import fingerprint as module
from megatron_opd.checkpoint.fingerprint import fingerprint, weight_files
from tests.tiny import save_tiny_model

SIZE = 100_000


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
@given(place=st.integers(0, SIZE - 1), flipped=st.integers(1, 255))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_altered_byte_anywhere_is_another_model(
    tmp_path: Path, name: str, place: int, flipped: int
) -> None:
    """With a memory too, which knows the file as it was."""
    (tmp_path / "config.json").write_text("{}")
    path, known = tmp_path / name, tmp_path / "cache" / "known.json"
    path.parent.mkdir(exist_ok=True)
    known.unlink(missing_ok=True)
    data = bytearray(SIZE)
    path.write_bytes(data)
    assert weight_files(tmp_path) == [path]
    before = fingerprint(tmp_path, known)
    data[place] ^= flipped
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").replace(path)
    assert before != fingerprint(tmp_path, known) == fingerprint(tmp_path)


def test_what_was_read_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path / "one", seed=1)
    known = tmp_path / "known.json"
    found = fingerprint(tmp_path / "one", known)
    with monkeypatch.context() as patch:
        patch.setattr(module, "checksum", pytest.fail)
        assert fingerprint(tmp_path / "one", known) == found
    for damaged in ("[]", "{", '{"a": 1}'):
        known.write_text(damaged)
        assert fingerprint(tmp_path / "one", known) == found
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["known.json"]
    assert fingerprint(tmp_path / "one", known / "below a file") == found


def test_a_long_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_model(tmp_path / "one", seed=1)
    monkeypatch.setattr(module, "LONG", 1000)
    for lines in (1, 0):
        fingerprint(tmp_path / "one", tmp_path / "known.json")
        assert capsys.readouterr().err.count("GB to know the teacher by") == lines
