"""What a started process owes the one that started it: its exit code, the reason of its end, and to end with it.

A mistake of the user (UserError) mostly strikes every rank alike, or one rank while the others wait for it.
So a started process writes it to the file that the launcher named, and the launcher prints one line for all
of them. Without such a launcher (one process, or another tool starts the ranks) the process prints it itself.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
from pathlib import Path

from megatron_opd.errors import Outage, UserError

REQUEUE_EXIT = 75
"""Exit code of a run that was asked to stop and has saved: the same command goes on. EX_TEMPFAIL of sysexits.h."""

LAUNCHER = "MEGATRON_OPD_LAUNCHER"  # process id of the launcher, in the environment of its workers
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # set for every worker, by torch's elastic agent too
USER_ERROR, FAILURE = "user_error", "failure"  # keys of the message in that file
EXIT_FILE = (
    "MEGATRON_OPD_EXIT_FILE"  # where the rank that ends first leaves its exit code, for `launch.slurm`
)
_PR_SET_PDEATHSIG = 1


def report_user_error(error: UserError) -> None:
    """Hands `error` to the launcher if there is one, else prints it to stderr as one `error: ...` line.

    Under SLURM only the rank that fails first prints: the mistake mostly is that of every rank. The process ends with
    `error.exit_code` then.
    """
    if leave_exit_code(error.exit_code):
        _report(" ".join(str(error).splitlines()), FAILURE if isinstance(error, Outage) else USER_ERROR)


def report_failure(line: str) -> None:
    """The same of a reason to end with another exit code than that of a mistake. Every rank prints its own."""
    _report(line, FAILURE)


def _report(line: str, key: str) -> None:
    path = os.environ.get(ERROR_FILE)
    if LAUNCHER in os.environ and path:
        # `message` is what torch's agent asks for, `key` what our launcher reads.
        with contextlib.suppress(OSError):  # a full disk may be the very mistake to report
            Path(path).write_text(json.dumps({"message": line, key: line}))
            return
        Path(path).unlink(missing_ok=True)
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f"rank {rank}: "
    print(f"error: {where}{line}", file=sys.stderr, flush=True)


def leave_exit_code(code: int) -> bool:
    """Tells the batch script how the run ends, if one wants to know; False if another rank has told it before.

    `srun` returns the highest code of all tasks: that of those it has killed after the first one ended.
    """
    path = os.environ.get(EXIT_FILE)
    if path is not None:
        try:
            with Path(path).open("x") as file:
                file.write(f"{code}\n")
        except FileExistsError:
            return False
        except OSError as error:
            print(f"cannot write {path}: {error.strerror}", file=sys.stderr, flush=True)
    return True


def end_with_launcher() -> None:
    """Has the kernel kill this process when its launcher dies, however it dies. Does nothing without a
    launcher.

    Linux only; elsewhere a launcher that is itself killed leaves its workers to notice their lost
    connections.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher is not None and sys.platform == "linux":
        _end_with(int(launcher))


def end_forks_with_this_process() -> None:
    """Has the kernel kill what this process forks when it dies, however it dies. Linux only.

    megatron-core forks the writers of a checkpoint: left behind, they would go on writing, and hold the lock of the
    run directory, while the run is started again.
    """
    parent = 0

    def remember() -> None:
        nonlocal parent
        # The kernel acts when the forking thread ends, so that only the main thread's forks are bound.
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0

    def bind() -> None:
        if parent:
            _end_with(parent)

    if sys.platform == "linux":
        os.register_at_fork(before=remember, after_in_child=bind)


def _end_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        os.kill(os.getpid(), signal.SIGKILL)
