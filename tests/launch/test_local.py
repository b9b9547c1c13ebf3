"""The launcher: exit codes and messages for every way a rank can end, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_opd.launch.local import Outcome, run_workers

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers find the package as this session does."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def alive(folder: Path) -> list[int]:
    """Process ids of the ranks that still run."""
    pids = [int(text) for text in (path.read_text() for path in folder.iterdir()) if text]
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


def launch(behaviour: str, folder: Path, processes: int = 2) -> Outcome:
    outcome = run_workers([str(WORKER), behaviour, str(folder)], processes, if_killed="mend it")
    assert not alive(folder)
    return outcome


def test_success_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("fine", tmp_path, 3) == Outcome(0)
    out, err = capfd.readouterr()
    threads = max(1, len(os.sched_getaffinity(0)) // 3)
    assert sorted(out.splitlines()) == [f"rank {rank} of 3, {threads} threads" for rank in range(3)]
    assert err == ""


def test_threads_that_the_user_chose_stay(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert launch("fine", tmp_path, 1) == Outcome(0)
    assert capfd.readouterr().out == "rank 0 of 1, 5 threads\n"


@pytest.mark.parametrize(
    ("behaviour", "outcome"),
    [
        ("mistake-on-1", Outcome(2, "bad key seen by rank 1")),
        ("usage", Outcome(2)),
        ("killed", Outcome(1, "rank 1 was killed by SIGKILL: mend it")),
    ],
)
def test_failures_leave_the_message_to_the_caller(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], behaviour: str, outcome: Outcome
) -> None:
    assert launch(behaviour, tmp_path) == outcome
    assert capfd.readouterr() == ("", "")


def test_a_mistake_that_all_ranks_see_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = launch("mistake", tmp_path)
    assert outcome.exit_code == 2
    assert outcome.message in ("bad key seen by rank 0", "bad key seen by rank 1")
    assert capfd.readouterr() == ("", "")


def test_a_mistake_that_cannot_be_handed_over_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch("mistake-unwritable", tmp_path) == Outcome(2)
    assert capfd.readouterr() == ("", "error: rank 1: the disk is full\n")


def test_a_bug_keeps_its_traceback_and_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("exception", tmp_path) == Outcome(
        1, "rank 1 ended with exit code 1: what it printed is above"
    )
    err = capfd.readouterr().err
    assert err.count("Traceback") == 1 and "RuntimeError: a bug" in err and "ChildFailedError" not in err


def test_what_a_killed_rank_has_forked_ends_with_it(tmp_path: Path) -> None:
    """As the writers of a checkpoint, which inherit the lock of the run directory."""
    run_workers([str(WORKER), "killed-with-a-fork", str(tmp_path)], 2)
    assert (tmp_path / "fork").exists()
    wait_for(lambda: not alive(tmp_path), "the fork should end")


def test_environment_and_signals_are_restored(tmp_path: Path) -> None:
    def state() -> tuple[object, ...]:
        names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
        return dict(os.environ), [signal.getsignal(sig) for sig in names]

    before = state()
    launch("killed", tmp_path)
    assert state() == before


@pytest.mark.parametrize(
    ("sig", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, "KeyboardInterrupt"), (signal.SIGKILL, -9)]
)
def test_ranks_end_with_a_launcher_that_is_ended(
    tmp_path: Path, sig: signal.Signals, code: int | str
) -> None:
    folder = tmp_path / "pids"
    folder.mkdir()
    script = tmp_path / "launcher.py"
    script.write_text(
        "import sys\nfrom megatron_opd.launch.local import run_workers\n"
        f"try:\n    sys.exit(run_workers([{str(WORKER)!r}, 'wait', {str(folder)!r}], 2).exit_code)\n"
        "except KeyboardInterrupt:\n    sys.exit('KeyboardInterrupt')\n"
    )
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path),
    }  # a killed launcher leaves its folder of error files
    launcher = subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        wait_for(lambda: len(alive(folder)) == 2, "two ranks should start")
        launcher.send_signal(sig)
        _, err = launcher.communicate(timeout=200)
        wait_for(lambda: not alive(folder), "no rank should be left")
    finally:
        launcher.kill()
    if isinstance(code, str):
        assert (launcher.returncode, err) == (1, f"{code}\n")
    else:
        assert (launcher.returncode, err) == (code, "")
