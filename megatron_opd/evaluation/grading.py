"""`Grader`: the way to the process that judges answers, started again whenever an answer was too much for it."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any, NamedTuple, Self

from megatron_opd.errors import UserError
from megatron_opd.evaluation.answers import plainly_same
from megatron_opd.evaluation.grading_process import CPU_SECONDS

MODULE = "megatron_opd.evaluation.grading_process"
WALL_SECONDS = 900.0  # without a reply: a process that neither computes nor answers
RIGHT = 1 - 1e-9  # a score from which on an answer is right


class Verdict(NamedTuple):
    """What an answer is worth, in [0, 1], and why it could not be judged, if it could not."""

    score: float
    trouble: str = ""


class Grader:
    """Judges answers in a process of its own, which lives as long as `with Grader() as grader:` does.

    A judgement may take `seconds` of CPU time. The same answer to the same problem is judged once; over one that ends
    the process a new process tries once more, for the first may have been killed for another reason.
    """

    def __init__(self, seconds: int = CPU_SECONDS) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._known: dict[str, Verdict] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._errors.close()

    def grade(self, answer: str, expected: str) -> Verdict:
        """Whether the answer equals the expected one: as text, as a number, or else as math-verify sees it."""
        same = plainly_same(answer, expected)
        if same is not None:
            return Verdict(float(same))
        return self._judge({"do": "grade", "answer": answer, "expected": expected})

    def score(self, task: dict[str, Any], index: int, answer: str) -> Verdict:
        """What the scorer of a reasoning-gym task gives for an answer to its problem at `index`."""
        return self._judge({"do": "score", "task": task, "index": index, "answer": answer})

    def problems(self, task: dict[str, Any]) -> list[tuple[str, str]]:
        """Question and answer of every problem of a reasoning-gym task: name, size, seed, options.

        Raises UserError when there is no such task or option.
        """
        reply = self._ask({"do": "list", "task": task})
        if "problems" not in reply:
            raise UserError(f"reasoning-gym makes no task {task['name']!r} of this: {reply['trouble']}")
        return [(question, answer) for question, answer in reply["problems"]]

    def _judge(self, request: dict[str, Any]) -> Verdict:
        key = json.dumps(request)
        if key not in self._known:
            reply = self._ask(request)
            self._known[key] = Verdict(reply["score"], reply.get("trouble", ""))
        return self._known[key]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        line = json.dumps(request).encode() + b"\n"
        for _ in range(2):
            if self._process is None:
                self._start()
            reply = self._exchange(line)
            if reply is not None:
                return reply
            if self._end() == -signal.SIGXCPU:
                return {"score": 0.0, "trouble": "given up: it takes too long"}
        return {"score": 0.0, "trouble": "given up: the grading process ended over it, twice"}

    def _start(self) -> None:
        """Start a process; once more if it ends, as by a signal to all of the run's processes that it does not yet
        ignore."""
        if self._started() or self._started():
            return
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines() or ["(it says nothing)"]
        raise UserError(f"evaluation.tasks: the grading process does not start: {lines[-1][:300]}")

    def _started(self) -> bool:
        self._errors.seek(0)
        self._errors.truncate()
        environment = {**os.environ, "PYTHONHASHSEED": "0"}  # generators may go by the order of sets
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(self._seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )
        ready = self._exchange(b"") == {"ready": True}
        if not ready:
            self._end()
        return ready

    def _exchange(self, line: bytes) -> dict[str, Any] | None:
        """Send a line and read one; None if the process has ended. One that says nothing for ever is ended here."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except BrokenPipeError:
            return None
        if not select.select([process.stdout], [], [], WALL_SECONDS)[0]:
            self._end()
            return {"score": 0.0, "trouble": "given up: the grading process neither computes nor answers"}
        reply = process.stdout.readline()
        return json.loads(reply) if reply.endswith(b"\n") else None

    def _end(self) -> int | None:
        """Kill the process if there is one; returns how it ended, or had ended before: its return code."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        process.communicate()
        return process.returncode
