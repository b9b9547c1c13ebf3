"""The lock of a run directory, which a job of SLURM waits for; errors of one rank that all ranks raise."""

import fcntl
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_opd.checkpoint import folders
from megatron_opd.errors import Outage, UserError
from megatron_opd.launch.worker import EXIT_FILE


class Screen:
    """Stands for stdout: `spoke` is set once a line was printed."""

    def __init__(self) -> None:
        self.text, self.spoke = "", threading.Event()

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        self.spoke.set()


def test_a_job_waits_for_the_lock_of_the_job_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "exit"))
    monkeypatch.setattr(folders, "LOCK_POLL", 0.01)
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    before = (tmp_path / ".lock").open("w")
    fcntl.flock(before, fcntl.LOCK_EX)

    def end() -> None:
        screen.spoke.wait()
        before.close()

    ending = threading.Thread(target=end)
    ending.start()
    folders.hold(tmp_path)
    ending.join()
    assert screen.text == f"{tmp_path} is in use by another process: waiting 300 s for it\n"
    with (tmp_path / ".lock").open("w") as another, pytest.raises(BlockingIOError):
        fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_that_stays_is_an_error_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "exit"))
    monkeypatch.setattr(folders, "LOCK_PATIENCE", 0.0)
    monkeypatch.setattr(folders, "LOCK_POLL", 0.01)
    with (tmp_path / ".lock").open("w") as before:
        fcntl.flock(before, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is in use by another process: wait for it"):
            folders.hold(tmp_path)
    assert capsys.readouterr().out.count("waiting") == 1


def failing(kinds: list[type[Exception] | None]) -> str:
    kind = kinds[dist.get_rank()]
    with pytest.raises(Exception) as caught, folders.alike(dist.group.WORLD):
        if kind is not None:
            raise kind("why")
    return f"{caught.type.__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([None, UserError], ["UserError: why"] * 2),
        ([Outage, None], ["Outage: why"] * 2),
        ([ValueError, Outage], ["Outage: why"] * 2),
        ([None, ValueError], ["RuntimeError: another process failed: why", "ValueError: why"]),
    ],
)
def test_an_outage_stays_one_on_every_rank(
    gloo: Any, kinds: list[type[Exception] | None], expected: list[str]
) -> None:
    assert gloo(2, failing, kinds) == expected
