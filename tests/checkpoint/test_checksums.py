"""A converted folder's checksums: right, compared wherever its numbers are read, and not missed in older folders."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_opd.checkpoint.checksums import CHECKSUMS, StateChecksums, checksum, first_damaged_file
from megatron_opd.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_opd.checkpoint.inspection import describe_folder
from megatron_opd.checkpoint.verify import verify_logits
from megatron_opd.checkpoint.verify_tensors import verify_tensors
from megatron_opd.errors import UserError
from tests.checkpoint.models import write_hf
from tests.checkpoint.test_inspection import rows


def convert_together(source: Path, target: Path) -> None:
    hf_to_megatron(source, target, group=dist.group.WORLD)


@pytest.fixture(scope="module")
def pair(gloo, tmp_path_factory) -> tuple[Path, Path]:
    """A Hugging Face folder, and the Megatron folder that two processes made of it."""
    folder = tmp_path_factory.mktemp("pair")
    hf = write_hf(folder / "hf", "llama", tied=True)
    gloo(2, convert_together, hf, folder / "megatron")
    return hf, folder / "megatron"


@pytest.fixture
def copy(pair, tmp_path) -> Path:
    """A copy of the Megatron folder, to be spoilt."""
    return Path(shutil.copytree(pair[1], tmp_path / "copy"))


def flip(path: Path) -> Path:
    """Change one bit in the middle of the numbers."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def data_files(folder: Path) -> list[Path]:
    files = sorted((folder / "state").glob("*.distcp"))
    assert len(files) == 2
    return files


def test_every_file_of_the_state_is_recorded(pair):
    sums = json.loads((pair[1] / CHECKSUMS).read_text())
    assert sums == {f"state/{path.name}": checksum(path) for path in (pair[1] / "state").iterdir()}
    assert first_damaged_file(pair[1]) is None


READERS: dict[str, Callable[[Path, Path, Path], object]] = {
    "megatron-to-hf": lambda folder, hf, out: megatron_to_hf(folder, out),
    "verify": lambda folder, hf, out: verify_logits(hf, folder),
    "verify --tensors": lambda folder, hf, out: verify_tensors(folder, hf),
    "inspect --check": lambda folder, hf, out: describe_folder(folder, check=True),
}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("reader", READERS)
def test_a_flipped_bit_is_found(pair, copy, tmp_path, reader, which):
    damaged = flip(data_files(copy)[which])
    expected = f"{damaged} is damaged: its SHA-256 is not the one in checksums.json; convert or copy the folder again"
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        READERS[reader](copy, pair[0], tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


def refused(folder: Path, target: Path) -> str:
    with pytest.raises(UserError) as caught:
        megatron_to_hf(folder, target, group=dist.group.WORLD)
    return str(caught.value)


def test_processes_share_the_comparison_and_the_refusal(gloo, copy, tmp_path):
    damaged = flip(data_files(copy)[0])
    messages = gloo(2, refused, copy, tmp_path / "out")
    assert messages[0] == messages[1] and f"{damaged} is damaged" in messages[0]
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


def bytes_compared(folder: Path) -> int:
    counted: list[int] = []
    StateChecksums(folder / "state").check(dist.group.WORLD, counted.append)
    return sum(counted)


def test_each_file_is_read_by_one_process(gloo, pair):
    total = StateChecksums(pair[1] / "state").nbytes
    assert total == sum(path.stat().st_size for path in (pair[1] / "state").iterdir())
    read = gloo(2, bytes_compared, pair[1])
    assert sum(read) == total and max(read) < 0.6 * total


def test_a_missing_file(copy):
    data_files(copy)[1].unlink()
    with pytest.raises(UserError, match=r"__1_0\.distcp is damaged: it is missing"):
        StateChecksums(copy / "state").check()


def test_files_that_people_may_edit_are_not_recorded(copy, tmp_path):
    config = copy / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"comment": "mine"}))
    megatron_to_hf(copy, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["comment"] == "mine"


@pytest.mark.parametrize("kept", [0, 1])
def test_a_file_that_is_not_recorded_beside_others(copy, kept):
    recorded = json.loads((copy / CHECKSUMS).read_text())
    (copy / CHECKSUMS).write_text(json.dumps(dict(list(recorded.items())[:kept])))
    with pytest.raises(
        UserError, match=r"is not in checksums\.json beside it: convert or copy the folder again$"
    ):
        StateChecksums(copy / "state").check()


def test_an_older_folder_is_read_and_said_to_be_one(pair, copy, tmp_path, capsys):
    (copy / CHECKSUMS).unlink()
    note = f"note: {copy} has no checksums.json, being of an older version: damaged numbers are not noticed\n"
    megatron_to_hf(copy, tmp_path / "out")
    assert capsys.readouterr().err == note
    assert verify_tensors(pair[0], copy).passed
    assert capsys.readouterr().err == note
    assert rows(describe_folder(copy))["checksums"].startswith("none, the folder is of an older version")


@pytest.mark.parametrize("content", ["{", "[]", '{"state/.metadata": 3}'])
def test_checksums_that_are_none(copy, tmp_path, content):
    (copy / CHECKSUMS).write_text(content)
    with pytest.raises(UserError, match=rf"{copy / CHECKSUMS} cannot be read"):
        megatron_to_hf(copy, tmp_path / "out")
    assert first_damaged_file(copy) == CHECKSUMS


def test_inspection_compares_only_when_asked(pair, copy):
    assert rows(describe_folder(pair[1], check=True))["checksums"] == "of 5 files, all right"
    flip(data_files(copy)[0])
    assert rows(describe_folder(copy))["checksums"] == "of 5 files, not compared (--check compares them)"


def test_a_checkpoint_of_a_run_is_compared_as_well(run_checkpoint, tmp_path):
    folder = Path(shutil.copytree(run_checkpoint, tmp_path / "copy"))
    assert "all right" in rows(describe_folder(folder, check=True))["checksums"]
    flip(max((folder / "state").glob("*.distcp"), key=lambda path: path.stat().st_size))
    with pytest.raises(UserError, match="is damaged: its SHA-256"):
        megatron_to_hf(folder, tmp_path / "out")
