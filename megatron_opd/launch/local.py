"""Starts the processes of a run on this machine and watches them, through torch's elastic agent in this
process.

One command for the user: rendezvous on a free port of the loopback interface, no restarts, and one line at
the end that says what went wrong, if anything did. When this function returns, none of the processes is left.
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_opd.launch.worker import LAUNCHER, USER_ERROR

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_GRACE = 30  # seconds a rank has to heed a SIGTERM
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True)
class Outcome:
    """How the processes ended: our exit code, and a line on what went wrong if none is printed yet."""

    exit_code: int
    message: str | None = None


def run_workers(arguments: Sequence[str], processes: int, *, if_killed: str = "") -> Outcome:
    """Runs `python ARGUMENTS...` as `processes` ranks and waits for all of them, or for the first failure.

    `if_killed` is what a user does after one of them was killed; the message ends with it.

    The ranks find RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in their environment and share this
    program's stdout and stderr. When one fails, the others get SIGTERM and after 30 seconds SIGKILL.
    Exit codes: 0; 2 when a rank ended by a mistake of the user; 1 for everything else. A signal to this
    process (Ctrl-C too) ends the ranks first: then KeyboardInterrupt for SIGINT, exit code 128 + signal for
    the others.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="megatron-opd-") as folder, _surroundings(processes):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            shutdown_timeout=_GRACE,
        )
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            return _outcome(error, if_killed)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            return Outcome(128 + error.sigval, f"stopped by {error.sigval.name}")
    return Outcome(0)


def _outcome(error: "ChildFailedError", if_killed: str) -> Outcome:
    """What to say about the ranks that failed. The agent lists those it stopped itself last."""
    mistakes = {rank: failure.error_file_data.get(USER_ERROR) for rank, failure in error.failures.items()}
    for rank in sorted(mistakes):
        if mistakes[rank] is not None:
            return Outcome(2, mistakes[rank])
    rank, failure = next(iter(error.failures.items()))
    for other, killed in error.failures.items():
        # A killed rank explains the lost connections of the others, whichever is listed first. The agent's
        # own SIGKILL comes seconds later, to ranks that did not heed its SIGTERM.
        at_once = killed.timestamp <= failure.timestamp + 1  # seconds
        if killed.exitcode < 0 and killed.exitcode != -signal.SIGTERM and at_once:
            rank, failure = other, killed
            break
    if failure.exitcode < 0:
        advice = f": {if_killed}" if if_killed else ""
        return Outcome(1, f"rank {rank} was killed by {failure.signal_name()}{advice}")
    if failure.exitcode == 2:  # a mistake that could not be handed over: the rank has printed it
        return Outcome(2)
    return Outcome(1, f"rank {rank} ended with exit code {failure.exitcode}: what it printed is above")


@contextlib.contextmanager
def _surroundings(processes: int) -> Iterator[None]:
    """The environment that the ranks inherit, a silent agent, and everything as before afterwards."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    before = dict(os.environ)
    agent, silence = logging.getLogger("torch.distributed.elastic"), logging.NullHandler()
    handlers = {sig: signal.getsignal(sig) for sig in _SIGNALS}
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    os.environ[LAUNCHER] = str(os.getpid())
    agent.addHandler(silence)
    agent.propagate = False  # what it would log, the outcome says in one line
    try:
        yield
    finally:
        agent.propagate = True
        agent.removeHandler(silence)
        os.environ.clear()
        os.environ.update(before)
        if threading.current_thread() is threading.main_thread():
            for sig, handler in handlers.items():
                signal.signal(sig, handler)
