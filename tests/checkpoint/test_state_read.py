"""Reading a checkpoint block by block: any block of any layout, and nothing in it is ever executed."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata

from megatron_opd.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_opd.checkpoint.state_read import StateReader, read_metadata
from megatron_opd.checkpoint.state_write import Block, start_state, write_state
from megatron_opd.errors import UserError
from megatron_opd.parallel.groups import ParallelLayout
from tests.checkpoint.models import megatron_results, write_hf


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_hf(folder / "hf", "llama", tied=True)
    hf_to_megatron(folder / "hf", folder / "megatron")
    return folder / "megatron"


@pytest.fixture
def megatron(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "megatron"))


NUMBERS = torch.arange(3 * 8 * 10, dtype=torch.float32).reshape(3, 8, 10).bfloat16()


@pytest.fixture(scope="module")
def cut_up(tmp_path_factory) -> StateReader:
    """`NUMBERS` in blocks of one layer: layer 0 whole, layer 1 in rows, layer 2 in columns of uneven width."""
    boxes = [((0, 0, 0), (1, 8, 10))]
    boxes += [((1, row, 0), (1, 2, 10)) for row in range(0, 8, 2)]
    boxes += [((2, 0, 0), (1, 8, 3)), ((2, 0, 3), (1, 8, 7))]
    blocks = [Block("x", (3, 8, 10), torch.bfloat16, offsets, sizes) for offsets, sizes in boxes]

    def make(index: int) -> torch.Tensor:
        box = tuple(slice(start, start + size) for start, size in zip(*boxes[index], strict=True))
        return NUMBERS[box]

    state = tmp_path_factory.mktemp("cut_up") / "state"
    start_state(state)
    write_state(state, blocks, ["y/shard_0_1"], make, None)
    return StateReader(state)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    starts = [draw(st.integers(0, size - 1)) for size in NUMBERS.shape]
    stops = [draw(st.integers(start + 1, size)) for start, size in zip(starts, NUMBERS.shape, strict=True)]
    return starts, [stop - start for start, stop in zip(starts, stops, strict=True)]


@settings(max_examples=60, deadline=None)
@given(box=boxes())
def test_any_block_is_read_from_blocks_of_another_shape(cut_up, box):
    starts, sizes = box
    expected = NUMBERS[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]
    assert torch.equal(cut_up.read("x", starts, sizes), expected)


def test_a_gap_is_no_zero(cut_up):
    with pytest.raises(UserError, match="x is not complete: 40 of 80 numbers are there"):
        cut_up.read("x", (0, 4, 0), (1, 8, 10))


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def attack_metadata(state: Path, marker: Path) -> None:
    metadata = read_metadata(state)
    metadata.planner_data = {"x": Attack(marker)}
    (state / ".metadata").write_bytes(pickle.dumps(metadata))


def attack_common(state: Path, marker: Path) -> None:
    torch.save({"x": Attack(marker)}, state / "common.pt")


@pytest.mark.parametrize("attack", [attack_metadata, attack_common])
def test_a_pickle_that_runs_code_is_refused(gloo, megatron, tmp_path, attack):
    attack(megatron / "state", tmp_path / "pwned")
    with pytest.raises(UserError, match=r"(\.metadata|common\.pt) is not to be trusted or damaged") as caught:
        megatron_to_hf(megatron, tmp_path / "out")
    assert str(caught.value).endswith("(it asks for posix.mkdir, which no checkpoint needs)")
    with pytest.raises(UserError, match="is not to be trusted"):
        gloo(1, megatron_results, megatron, ParallelLayout())
    assert {path.name for path in tmp_path.iterdir()} == {"megatron"}


def test_objects_beside_the_tensors_run_no_code_when_megatron_core_loads_them(gloo, megatron, tmp_path):
    """The small objects of parallel layers, which megatron-core would unpickle without restriction."""
    metadata, marker = read_metadata(megatron / "state"), tmp_path / "pwned"
    torch.save([Attack(marker)], megatron / "state" / "evil.distcp")
    for index, info in metadata.storage_data.items():
        if "_extra_state" in index.fqn:
            info.relative_path, info.offset = "evil.distcp", 0
            info.length = (megatron / "state" / "evil.distcp").stat().st_size
    (megatron / "state" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        UserError, match=r"cannot read .*: it asks for posix\.mkdir, which no checkpoint needs$"
    ):
        gloo(1, megatron_results, megatron, ParallelLayout())
    (megatron / "checksums.json").unlink()
    megatron_to_hf(megatron, tmp_path / "out")  # which does not read them
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps({"a": 1}), "something else than a checkpoint's metadata"),
        (pickle.dumps(Metadata({})), "something else than a checkpoint's metadata"),
        (b"", "Ran out of input"),
        (b"\x80\x04c__builtin__\neval\n.", "asks for"),
    ],
)
def test_metadata_that_is_none(megatron, tmp_path, content, reason):
    (megatron / "state" / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=reason):
        megatron_to_hf(megatron, tmp_path / "out")


def test_a_block_outside_of_the_folder_is_refused(megatron, tmp_path):
    metadata = read_metadata(megatron / "state")
    for info in metadata.storage_data.values():
        info.relative_path = "../../secret"
    (megatron / "state" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="is said to lie outside of it"):
        megatron_to_hf(megatron, tmp_path / "out")


def test_another_format_is_refused(megatron, tmp_path):
    path = megatron / "state" / "metadata.json"
    path.write_text(path.read_text().replace("torch_dist", "zarr"))
    with pytest.raises(UserError, match="format 'zarr' is not supported"):
        megatron_to_hf(megatron, tmp_path / "out")
    path.write_text("{")
    with pytest.raises(UserError, match=r"metadata\.json cannot be read"):
        megatron_to_hf(megatron, tmp_path / "out")
