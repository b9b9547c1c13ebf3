"""Starts the processes of a run on this machine, passes signals on to them and watches them.

One command for the user: the ranks find each other at a free port of the loopback interface, there are no restarts,
and one line at the end says what went wrong, if anything did. A first SIGUSR1, SIGTERM or SIGINT goes on to the ranks,
which have all the time they need to save; a second one ends them at once. When this function returns, none of the
processes is left.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from megatron_opd.launch.worker import ERROR_FILE, FAILURE, LAUNCHER, REQUEUE_EXIT, USER_ERROR

_GRACE = 10.0  # seconds that ranks have to end after one has failed, and after a second signal
_POLL = 0.1  # seconds
_AT_ONCE = (signal.SIGHUP, signal.SIGQUIT)
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, *_AT_ONCE)


@dataclass(frozen=True)
class Outcome:
    """How the processes ended: our exit code, and a line on what went wrong if none is printed yet."""

    exit_code: int
    message: str | None = None


def run_workers(arguments: Sequence[str], processes: int, *, if_killed: str = "") -> Outcome:
    """Runs `python ARGUMENTS...` as `processes` ranks and waits for all of them, or for the first failure.

    `if_killed` is what a user does after one of them was killed; the message ends with it.

    The ranks find RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in their environment and share this
    program's stdout and stderr. When one fails, the others get SIGTERM and after 10 seconds SIGKILL.
    Exit codes: 0; REQUEUE_EXIT when a signal has stopped the ranks and they have saved; 2 when a rank ended by a
    mistake of the user; 1 for everything else. Ranks that a signal to this process has ended without saving:
    KeyboardInterrupt for SIGINT (Ctrl-C), exit code 128 + signal for the others.
    """
    from torch.distributed import TCPStore

    # It serves as long as it is referenced.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="megatron-opd-") as folder, _heard() as heard:
        ranks = [
            _Rank(number, Path(folder) / f"{number}.json").start(arguments, processes, store.port)
            for number in range(processes)
        ]
        try:
            _watch(ranks, heard)
        finally:
            _end(ranks)
        return _outcome(ranks, heard, if_killed)


@dataclass
class _Rank:
    number: int
    error_file: Path
    process: subprocess.Popen[bytes] = field(init=False)
    failed: bool = False  # by itself, not because of what this program sent it

    def start(self, arguments: Sequence[str], processes: int, port: int) -> "_Rank":
        """Start it as one of so many ranks, whose store is at `port`."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment = {
            "OMP_NUM_THREADS": str(max(1, cores // processes)),
            **os.environ,
            "RANK": str(self.number),
            "LOCAL_RANK": str(self.number),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's name for: the store is the launcher's
            "TORCHELASTIC_RESTART_COUNT": "0",
            LAUNCHER: str(os.getpid()),
            ERROR_FILE: str(self.error_file),
        }
        # A session of its own: Ctrl-C in a terminal is this program's to pass on.
        command = [sys.executable, *arguments]
        self.process = subprocess.Popen(command, env=environment, start_new_session=True)
        return self

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def told(self, key: str) -> str | None:
        """What the rank has handed over as the reason of its end."""
        with suppress(OSError, ValueError):
            found = json.loads(self.error_file.read_text()).get(key)
            return None if found is None else str(found)
        return None


def _watch(ranks: Sequence[_Rank], heard: Sequence[signal.Signals]) -> None:
    """Until all ranks have ended, one has failed or they are to end at once; signals are passed on."""
    passed_on = 0
    while any(rank.code is None for rank in ranks):
        for received in heard[passed_on:]:
            passed_on += 1
            _send(ranks, received)
        for rank in ranks:
            rank.failed = rank.code not in (None, 0, REQUEUE_EXIT)
        if passed_on > 1 or any(rank.failed for rank in ranks) or set(heard) & set(_AT_ONCE):
            return
        time.sleep(_POLL)
    for rank in ranks:
        rank.failed = rank.code not in (0, REQUEUE_EXIT)


def _send(ranks: Sequence[_Rank], number: signal.Signals) -> None:
    for rank in ranks:
        if rank.code is None:
            rank.process.send_signal(number)


def _end(ranks: Sequence[_Rank]) -> None:
    """End what still runs, also a rank that is stopped."""
    _send(ranks, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE
    while any(rank.code is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(_POLL)
    _send(ranks, signal.SIGKILL)
    for rank in ranks:
        rank.process.wait()


def _outcome(ranks: Sequence[_Rank], heard: Sequence[signal.Signals], if_killed: str) -> Outcome:
    """What to say about the ranks that failed, and those that were stopped."""
    failed = [rank for rank in ranks if rank.failed]
    # A killed rank explains what the others say of their lost connections.
    killed = [rank for rank in failed if rank.process.returncode < 0]
    for key, code in ((USER_ERROR, 2), *([] if killed else [(FAILURE, 1)])):
        for line in (rank.told(key) for rank in ranks):
            if line is not None:
                return Outcome(code, line)
    ended_by = [code for number in heard for code in (-number, 128 + number)]
    if len(heard) > 1 or any(rank.code in ended_by for rank in failed) or set(heard) & set(_AT_ONCE):
        if signal.SIGINT in heard:
            raise KeyboardInterrupt
        return Outcome(128 + heard[-1], f"stopped by {heard[-1].name}")
    if not failed:
        return Outcome(max(rank.process.returncode for rank in ranks))
    rank = (killed or failed)[0]
    code = rank.process.returncode
    if code < 0:
        advice = f": {if_killed}" if if_killed else ""
        return Outcome(1, f"rank {rank.number} was killed by {signal.Signals(-code).name}{advice}")
    if code == 2:  # a mistake that could not be handed over: the rank has printed it
        return Outcome(2)
    return Outcome(1, f"rank {rank.number} ended with exit code {code}: what it printed is above")


@contextmanager
def _heard() -> Iterator[list[signal.Signals]]:
    """The signals that this process gets from now on, in order, and the handlers as before afterwards."""
    heard: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    handlers = {
        number: signal.signal(number, lambda number, _: heard.append(signal.Signals(number)))
        for number in _SIGNALS
    }
    try:
        yield heard
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
