"""The guard of a server: whatever ends first, nothing of the server's processes is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_opd.rollout import guard

# A server with a worker in a session of its own, as a program that daemonises would have.
SERVER = """
import os, subprocess, sys, time
worker = subprocess.Popen(["sleep", "600"], start_new_session=True)
with open(sys.argv[1] + ".part", "w") as file:
    file.write(f"{os.getpid()} {worker.pid}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(600)
"""
PARENT = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, sys.argv[1], str(os.getpid()), *sys.argv[2:]])
time.sleep(600)
"""


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def processes_of(file: Path) -> list[psutil.Process]:
    wait_for(file.exists)
    return [psutil.Process(int(pid)) for pid in file.read_text().split()]


def ended(processes: list[psutil.Process]) -> bool:
    return all(not each.is_running() or each.status() == psutil.STATUS_ZOMBIE for each in processes)


@pytest.mark.parametrize("how", ["parent killed", "guard killed", "guard terminated", "server killed"])
def test_nothing_is_left(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-c", SERVER, str(tmp_path / "pids")]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, guard.__file__, *command])
    try:
        server, worker = processes_of(tmp_path / "pids")
        (guarding,) = psutil.Process(parent.pid).children()
        {
            "parent killed": lambda: os.kill(parent.pid, signal.SIGKILL),
            "guard killed": guarding.kill,
            "guard terminated": guarding.terminate,
            "server killed": server.kill,
        }[how]()
        # The kernel ends the server when the guard is killed; what the server made is then the server's to end.
        wait_for(lambda: ended([server] if how == "guard killed" else [server, worker, guarding]))
    finally:
        parent.kill()
        parent.wait()
        worker.kill() if worker.is_running() else None


@pytest.mark.parametrize(("command", "code"), [("exit 3", 3), ("kill -9 $$", 137)])
def test_hands_on_the_exit_code(command: str, code: int) -> None:
    arguments = [sys.executable, guard.__file__, str(os.getpid()), "sh", "-c", command]
    assert subprocess.run(arguments, timeout=60).returncode == code


def test_starts_nothing_for_a_parent_that_has_ended(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    arguments = [sys.executable, guard.__file__, str(gone.pid), "touch", str(tmp_path / "started")]
    assert subprocess.run(arguments, timeout=60).returncode == 0
    assert not (tmp_path / "started").exists()
