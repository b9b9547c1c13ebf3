"""The process that judges answers: `python -m megatron_opd.evaluation.grading_process SECONDS`, JSON lines in and out.

Nothing that a model writes is trusted: math-verify and the scorers of reasoning-gym may run for ever over it, or take
all memory. A judgement has SECONDS of CPU time; what other processes take does not count. What goes on beyond that, in
C say, ends this process, which the other side then starts again. It says {"ready": true} first. It ends with its
stdin: signals by which a run is stopped, which may well come to all of its processes, do not take an answer from it.
"""

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

CPU_SECONDS = 5  # of one judgement, unless told otherwise; then it is given up
LAST_CPU_SECONDS = 5  # more, then the kernel ends this process
LISTING_SECONDS = 600  # the same for making a whole data set
MEMORY = 6 << 30  # bytes of address space
_OF_THE_RUN = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class GivenUp(BaseException):
    """The time of a judgement is over. No `except Exception` in a library may swallow it."""


def main(seconds: int) -> None:
    """Answers every line of stdin until it ends; a judgement may take so many seconds of CPU time."""
    for number in _OF_THE_RUN:
        signal.signal(number, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    _say(replies, {"ready": True})
    for line in sys.stdin:
        _say(replies, serve(json.loads(line), seconds))


def _say(replies: Any, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def serve(request: dict[str, Any], seconds: int) -> dict[str, Any]:
    """The reply to one request, which says what to `do`.

    `grade`: {"score": 1.0 or 0.0} of `answer` against `expected`. `list`: {"problems": [...]} of a reasoning-gym task.
    `score`: {"score": ...} of `answer` to the problem at `index` of such a task. What goes wrong is "trouble", with the
    score 0.
    """
    do = request["do"]
    try:
        if do == "list":
            with limited(LISTING_SECONDS):
                entries = _entries(json.dumps(request["task"]))
                return {"problems": [[entry["question"], str(entry["answer"])] for entry in entries]}
        if do == "score":
            _entries(json.dumps(request["task"]))  # made before the clock runs
        with limited(seconds):
            return {"score": _graded(request) if do == "grade" else _scored(request)}
    except GivenUp:
        return {"score": 0.0, "trouble": "given up: it takes too long"}
    except Exception as error:  # whatever a parser or a scorer stumbles over
        return {"score": 0.0, "trouble": f"{type(error).__name__}: {str(error)[:200]}"}


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Inside, GivenUp is raised after so many seconds of CPU time, again every second, and the process ends later."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise GivenUp

    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    before = resource.getrlimit(resource.RLIMIT_CPU)
    handler = signal.signal(signal.SIGPROF, give_up)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + 1 + seconds + LAST_CPU_SECONDS, before[1]))
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_CPU, before)


def _graded(request: dict[str, Any]) -> float:
    """1 if math-verify holds the answer for equal to the expected one."""
    import math_verify

    expected, answer = (
        math_verify.parse(rf"\boxed{{{request[name]}}}", parsing_timeout=None)
        for name in ("expected", "answer")
    )
    return float(
        bool(expected) and bool(answer) and math_verify.verify(expected, answer, timeout_seconds=None)
    )


def _scored(request: dict[str, Any]) -> float:
    """What the task's own scorer gives, in [0, 1]."""
    data = _data_set(json.dumps(request["task"]))
    entry = _entries(json.dumps(request["task"]))[request["index"]]
    return min(1.0, max(0.0, float(data.score_answer(answer=request["answer"], entry=entry))))


@cache
def _data_set(task: str) -> Any:
    """`task` is JSON: name, size, seed and options of the generator."""
    import reasoning_gym

    told = json.loads(task)
    return reasoning_gym.create_dataset(told["name"], size=told["size"], seed=told["seed"], **told["options"])


@cache
def _entries(task: str) -> list[dict[str, Any]]:
    data = _data_set(task)
    return [data[index] for index in range(len(data))]


if __name__ == "__main__":
    main(int(sys.argv[1]))
