"""A tiny rank for the launcher's tests: `python tests/launch/worker.py BEHAVIOUR FOLDER`.

It leaves its process id in FOLDER and then ends, fails, dies or waits as BEHAVIOUR says.
"""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from megatron_opd.errors import UserError
from megatron_opd.launch.worker import end_forks_with_this_process, end_with_launcher, report_user_error


def behave(behaviour: str, rank: int) -> None:
    match behaviour, rank:
        case ("mistake", _) | ("mistake-on-1", 1):
            report_user_error(UserError(f"bad key\nseen by rank {rank}"))
            sys.exit(2)
        case "mistake-unwritable", 1:
            os.environ["TORCHELASTIC_ERROR_FILE"] = "/nowhere/error.json"
            report_user_error(UserError("the disk is full"))
            sys.exit(2)
        case "usage", 1:
            sys.exit(2)
        case "killed", 1:
            os.kill(os.getpid(), signal.SIGKILL)
        case "killed-with-a-fork", 1:
            multiprocessing.get_context("fork").Process(target=leave_pid_and_wait, args=("fork",)).start()
            while not Path(sys.argv[2], "fork").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        case "exception", 1:
            raise RuntimeError("a bug")
        case "fine", _:
            print(
                f"rank {rank} of {os.environ['WORLD_SIZE']}, {os.environ['OMP_NUM_THREADS']} threads",
                flush=True,
            )
            return
    time.sleep(600)


def leave_pid_and_wait(name: str) -> None:
    Path(sys.argv[2], name).write_text(str(os.getpid()))
    time.sleep(600)


if __name__ == "__main__":
    end_with_launcher()
    end_forks_with_this_process()
    rank = int(os.environ["RANK"])
    Path(sys.argv[2], str(rank)).write_text(str(os.getpid()))
    try:
        behave(sys.argv[1], rank)
    except KeyboardInterrupt:  # as the command line does
        sys.exit(130)
