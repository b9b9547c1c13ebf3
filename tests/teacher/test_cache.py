"""Files of a teacher's cache: found again by what they depend on alone, never believed when damaged, bounded."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.data.loss_mask import LossMask
from megatron_opd.data.packing import pack
from megatron_opd.errors import UserError
from megatron_opd.teacher import cache as files
from megatron_opd.teacher.cache import PayloadCache, Segment, Source, read_file, segments_of
from megatron_opd.teacher.payload import PayloadFormat
from tests.gloo_pool import GlooPools
from tests.tiny import recorded_rollouts, with_teacher_prompts

FORM = PayloadFormat("hidden_states", 6, 300, torch.bfloat16)
TOPK = PayloadFormat("topk", 6, 300, torch.bfloat16, k=3)
SOURCE = Source("a" * 64, "megatron", FORM)
SEGMENT = Segment(torch.arange(3, 12), torch.tensor([4, 5, 8]), torch.tensor([8, 9, 77]))


def rows_of(form: PayloadFormat, count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(-9, 9, (count, *trailing), generator=generator).to(dtype)
        for trailing, dtype in form.tensors
    ]


def cache_in(folder: Path, source: Source = SOURCE, max_bytes: float = 1e9) -> PayloadCache:
    return PayloadCache(folder, source, max_bytes=max_bytes)


def the_file(folder: Path) -> Path:
    (path,) = folder.rglob("*.safetensors")
    return path


@pytest.mark.parametrize("form", [FORM, TOPK, replace(TOPK, kind="sampled"), replace(FORM, kind="logits")])
def test_what_was_written_is_read_bit_for_bit(tmp_path: Path, form: PayloadFormat) -> None:
    source = replace(SOURCE, form=form)
    assert cache_in(tmp_path, source).read(SEGMENT) is None
    rows = rows_of(form, 3)
    cache_in(tmp_path, source).write(SEGMENT, rows)
    found = cache_in(tmp_path, source).read(SEGMENT)
    assert found is not None
    for tensor, expected in zip(found, rows, strict=True):
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
    assert not list(tmp_path.rglob(".*")), "nothing is left aside"


@pytest.mark.parametrize(
    "other",
    [
        replace(SOURCE, fingerprint="b" * 64),
        replace(SOURCE, engine="sglang"),
        replace(SOURCE, form=replace(FORM, dtype=torch.float32)),
        replace(SOURCE, form=replace(FORM, kind="logits")),
        replace(SOURCE, form=TOPK),
    ],
)
def test_another_source_has_other_files(tmp_path: Path, other: Source) -> None:
    cache_in(tmp_path).write(SEGMENT, rows_of(FORM, 3))
    assert cache_in(tmp_path, other).read(SEGMENT) is None


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("hidden_states", set()),
        ("logits", {"vocab_size"}),
        ("topk", {"vocab_size", "k", "temperature"}),
        ("sampled", {"vocab_size", "temperature"}),
    ],
)
def test_what_numbers_depend_on_is_in_the_name(kind: Any, names: set[str]) -> None:
    form = replace(TOPK, kind=kind)
    changed: dict[str, Any] = {"vocab_size": 299, "k": 4, "temperature": 0.5}
    keys = {
        name: SEGMENT.key(replace(SOURCE, form=replace(form, **{name: value})))
        for name, value in changed.items()
    }
    assert {name for name, key in keys.items() if key != SEGMENT.key(replace(SOURCE, form=form))} == names


@pytest.mark.parametrize("name", ["tokens_L", "positions_R", "targets_R"])
def test_another_sequence_has_another_file(name: str) -> None:
    changed = getattr(SEGMENT, name).clone()
    changed[-1] += 1
    assert replace(SEGMENT, **{name: changed}).key(SOURCE) != SEGMENT.key(SOURCE)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def another_format(path: Path) -> None:
    other = path.parent.parent / "other"
    source = replace(SOURCE, form=TOPK)
    cache_in(other, source).write(SEGMENT, rows_of(TOPK, 3))
    the_file(other).replace(path)


@pytest.mark.parametrize("damage", [cut_short, empty, no_header, one_bit, another_format])
def test_a_damaged_file_is_a_miss_that_is_said_and_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    cache = cache_in(tmp_path)
    cache.write(SEGMENT, rows_of(FORM, 3))
    path = the_file(tmp_path)
    damage(path)
    if damage is not another_format:
        with pytest.raises(UserError, match=r"no whole file"):
            read_file(path)
    assert cache.read(SEGMENT) is None
    said = capsys.readouterr().err
    assert said.startswith(f"warning: teacher.cache: {path} is damaged (") and said.count("\n") == 1
    assert not path.exists()
    cache.write(SEGMENT, rows_of(FORM, 3, seed=1))
    found = cache.read(SEGMENT)
    assert found is not None and torch.equal(found[0], rows_of(FORM, 3, seed=1)[0])


def test_a_file_says_what_it_is_about(tmp_path: Path) -> None:
    source = replace(SOURCE, form=TOPK)
    cache_in(tmp_path, source).write(SEGMENT, rows_of(TOPK, 3))
    tensors, about = read_file(the_file(tmp_path))
    assert tensors["tokens"].tolist() == SEGMENT.tokens_L.tolist()
    assert tensors["targets"].tolist() == SEGMENT.targets_R.tolist()
    assert {"logprob", "ids", "ids_logprob"} < set(tensors)
    assert about["teacher"] == SOURCE.fingerprint and about["kind"] == "topk" and about["k"] == "3"


def test_a_disk_that_refuses_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = cache_in(tmp_path)
    (tmp_path / SEGMENT.key(SOURCE)[:2]).write_text("in the way")
    for _ in range(2):
        cache.write(SEGMENT, rows_of(FORM, 3))
    said = capsys.readouterr().err
    assert said.count("warning: teacher.cache: cannot write") == 1 and said.count("\n") == 1
    with pytest.raises(UserError, match=r"teacher\.cache: cannot write"):
        cache_in(tmp_path / SEGMENT.key(SOURCE)[:2])


def test_the_oldest_files_go_when_there_are_too_many_bytes(tmp_path: Path) -> None:
    segments = [replace(SEGMENT, targets_R=torch.tensor([n, n, n])) for n in range(12)]
    first = cache_in(tmp_path)
    first.write(segments[0], rows_of(FORM, 3))
    size = the_file(tmp_path).stat().st_size
    cache = cache_in(tmp_path, max_bytes=10 * size)
    for age, segment in enumerate(segments):
        cache.write(segment, rows_of(FORM, 3))
        path = cache._path(segment)
        os.utime(path, (1e9 + age, 1e9 + age))
    left = [segment for segment in segments if cache.read(segment) is not None]
    assert left == segments[len(segments) - len(left) :], "the newest are there"
    assert 9 <= len(left) <= 10


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    cache = cache_in(tmp_path)
    inner = tmp_path / "ab"
    inner.mkdir()
    old, new = inner / f".x.1{files.ASIDE}", inner / f".x.2{files.ASIDE}"
    for path, seconds in ((old, 0.0), (new, None)):
        path.write_text("half")
        if seconds is not None:
            os.utime(path, (seconds, seconds))
    cache.write(SEGMENT, rows_of(FORM, 3))
    assert not old.exists() and new.exists(), "another process may still write it"


def use_together(folder: Path) -> list[str]:
    """Write and read the same sequences as the other ranks, with room for a third of them; what went wrong."""
    wrong: list[str] = []
    order = torch.randperm(60, generator=torch.Generator().manual_seed(dist.get_rank())).tolist()
    cache = cache_in(folder, max_bytes=20 * 600)
    with mock.patch.object(files, "_warn", wrong.append):
        for n in order * 3:
            segment = replace(SEGMENT, targets_R=torch.tensor([n, n, n]))
            cache.write(segment, rows_of(FORM, 3, seed=n))
            found = cache.read(segment)
            if found is not None and not torch.equal(found[0], rows_of(FORM, 3, seed=n)[0]):
                wrong.append(f"{n} is another's")
    return wrong


def test_processes_use_a_folder_together(gloo: GlooPools, tmp_path: Path) -> None:
    assert gloo(2, use_together, tmp_path) == [[], []]
    assert 1 < len(list(tmp_path.rglob("*.safetensors"))) < 60
    assert not list(tmp_path.rglob(f"*{files.ASIDE}"))


@pytest.mark.parametrize("alignment", [1, 8])
def test_segments_are_the_sequences_without_padding(alignment: int) -> None:
    rollouts = with_teacher_prompts(recorded_rollouts(6))
    mask = LossMask(token_ids=frozenset(range(40, 60)))
    packed = pack(rollouts, dp_size=1, token_budget=96, alignment=alignment, loss_mask=mask)[0]
    for role in ("student", "teacher"):
        read = [each.for_teacher if role == "teacher" else each for each in packed]
        found = [segment for microbatch in read for segment in segments_of(microbatch)]
        whole = [torch.cat([microbatch.targets_T[microbatch.mask_T] for microbatch in read])]
        assert torch.equal(torch.cat([segment.targets_R for segment in found]), whole[0])
        prompts = {
            (r.prompt_id, role): (r.prompt_ids, r.teacher_prompt_ids)[role == "teacher"] for r in rollouts
        }
        sequences = {tuple(prompts[r.prompt_id, role] + r.response_ids[:-1]) for r in rollouts}
        assert {tuple(segment.tokens_L.tolist()) for segment in found} == sequences
