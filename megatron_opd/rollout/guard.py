"""Runs a command, and ends it with all it has started when the process that asked for it ends, however that ends.

A program of its own, `python guard.py PARENT_PID COMMAND...`: a trainer that is killed can end nothing itself. The
guard waits for three things: the end of its parent, the end of the command, and SIGTERM. Whichever comes first, it
kills what is left of the command's processes, even those that made a session of their own. Linux only.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys

import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_prctl = ctypes.CDLL(None).prctl


def guard(parent: int, command: list[str]) -> int:
    """Run the command to its end; returns its exit code, 128 + signal when a signal ended it."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans of the command become children of this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # For the trainer: a scheduler sends it to all processes of a job. The command inherits that.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        watched = os.pidfd_open(parent)
    except ProcessLookupError:
        return 0
    if os.getppid() != parent:  # it ended before the line above
        return 0
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_end_with_guard)
        ended = os.pidfd_open(process.pid)
        select.select([watched, ended], [], [])
        code = process.poll()
        return 0 if code is None else code if code >= 0 else 128 - code
    finally:
        _kill_descendants()


def _end_with_guard() -> None:
    """Between fork and exec: the kernel kills the command should the guard itself be killed."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _kill_descendants() -> None:
    """SIGKILL: SGLang answers SIGTERM by finishing its requests first, and a stuck one never finishes."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while children := psutil.Process().children(recursive=True):
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        psutil.wait_procs(children, timeout=1)


if __name__ == "__main__":
    sys.exit(guard(int(sys.argv[1]), sys.argv[2:]))
