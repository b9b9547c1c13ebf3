"""The writers of a checkpoint: what becomes of a save when one fails, is killed, or is told to stop with the run."""

import errno
import io
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_opd.checkpoint import writing
from megatron_opd.checkpoint.checksums import checksum, first_damaged_file
from megatron_opd.checkpoint.published import Retention, published
from megatron_opd.checkpoint.store import CheckpointStore
from megatron_opd.errors import UserError
from megatron_opd.parallel.groups import ParallelLayout
from tests.training.tiny_run import TinyRun, build_run


def begun(models: Path, folder: Path, patch: pytest.MonkeyPatch, hinder: Callable) -> CheckpointStore:
    """A store with one checkpoint whose second is being written, on rank 1 by writers that are hindered."""
    run = build_run(ParallelLayout(tensor=2), models)
    store = CheckpointStore(folder, Retention(2), run.groups, models / "student-True", {})
    save(run, store, 1)
    assert not store.written(), "nothing is under way"
    store.publish()
    if dist.get_rank() == 1:
        hinder(patch)
    save(run, store, 2)
    patch.undo()
    return store


def save(run: TinyRun, store: CheckpointStore, step: int) -> None:
    store.save(step, run.student.chunks, run.student.optimizer, {})


def fill_disk(patch: pytest.MonkeyPatch) -> None:
    """As a disk does that takes what is written and has no space when it is synced; inherited by the writers."""

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, "fsync", no_space)


def wait_for_a_file(path: Path, patch: pytest.MonkeyPatch) -> None:
    def when_there(file: Path) -> str:
        while not path.exists():
            time.sleep(0.01)
        return checksum(file)

    patch.setattr(writing, "checksum", when_there)


def tell(store: CheckpointStore, *signals: int) -> None:
    """Send signals to the writers of rank 1."""
    for process in writers(store) if dist.get_rank() == 1 else []:
        assert process.pid is not None
        for each in signals:
            os.kill(process.pid, each)


def writers(store: CheckpointStore) -> list[ForkProcess]:
    assert store._under_way is not None
    return [process for process, _ in store._under_way.writing._writers]


def fail(models: Path, folder: Path, signals: list[int]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        if signals:
            store = begun(models, folder, patch, lambda patch: wait_for_a_file(folder / "never", patch))
            assert not store.written(), "rank 1 is not"
        else:
            store = begun(models, folder, patch, fill_disk)
    tell(store, *signals)
    with pytest.raises(UserError) as caught:
        store.publish()
    assert not store.under_way
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("signals", "reason"),
    [
        ([], "no space left on device"),
        ([signal.SIGKILL], "a process that writes it was killed, as it is when memory runs out"),
    ],
    ids=["disk full", "killed"],
)
def test_a_writer_that_fails_on_one_rank_is_one_line_on_all(gloo, models, tmp_path, signals, reason):
    messages = gloo(2, fail, models, tmp_path, signals)
    assert messages[0] == messages[1]
    kind = "Outage" if signals else "UserError"
    assert messages[0].startswith(f"{kind}: cannot save a checkpoint to {tmp_path}: {reason}; mend that")
    assert "checkpoints kept: step_00000001" in messages[0]
    assert [path.name for path in published(tmp_path)] == ["step_00000001"]
    assert not list(tmp_path.glob(".writing*"))


@pytest.mark.parametrize("left", [0, 1, 40, 900])
def test_a_writer_that_is_killed_while_it_tells_its_outcome(left):
    process = multiprocessing.get_context("fork").Process(target=os.kill, args=(os.getpid(), 0))
    process.start()
    outcome = io.BytesIO(pickle.dumps(([("file", "x" * 900)], "a" * 64))[:left])
    found = writing._outcome(process, outcome)
    assert isinstance(found, RuntimeError) and "a writer ended with exit code 0" in str(found)


def stopped(models: Path, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        store = begun(models, folder, patch, lambda patch: wait_for_a_file(folder / "go on", patch))
    tell(store, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    assert not store.written()
    dist.barrier()
    (folder / "go on").touch()
    store.publish()


def test_a_run_that_is_told_to_stop_gets_its_save(gloo, models, tmp_path):
    """Who stops a run by a signal may well send it to the writers too."""
    gloo(2, stopped, models, tmp_path)
    assert [path.name for path in published(tmp_path)] == ["step_00000001", "step_00000002"]
    assert first_damaged_file(tmp_path / "step_00000002") is None


def abandoned(models: Path, folder: Path) -> list[int | None]:
    with pytest.MonkeyPatch.context() as patch:
        store = begun(models, folder, patch, lambda patch: wait_for_a_file(folder / "never", patch))
    store.abandon()
    return [process.exitcode for process in writers(store)]


def test_a_run_that_fails_leaves_no_writer_behind(gloo, models, tmp_path):
    codes = gloo(2, abandoned, models, tmp_path)
    assert codes[1] and set(codes[1]) == {-signal.SIGKILL}
    assert [path.name for path in published(tmp_path)] == ["step_00000001"]
