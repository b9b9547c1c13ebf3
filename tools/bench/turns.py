"""Steps taken in turns with a training in a process of its own: `tools.bench.end_to_end` and its peers.

Standard library only, as the peer's environment has packages of its own. The two talk in lines of JSON: the peer says
when it is ready, takes a step for every line that it is given, and answers with what the step took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True)
class Step:
    """What a training step took: all of it, from prompts to the lines of its log."""

    seconds: float
    cpu_seconds: float  # of all threads: what other work on the machine hardly changes
    prompt_tokens: int
    response_tokens: int
    peak_bytes: int  # most memory that the process has had resident since it began

    @property
    def speed(self) -> float:
        """Response tokens a second."""
        return self.response_tokens / self.seconds


def peak_bytes() -> int:
    """The most that this process has had resident at once (Linux)."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


class Stopwatch:
    """Begins a step when it is made."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def step(self, prompt_tokens: int, response_tokens: int) -> Step:
        """The step, which ends now."""
        wall, cpu = self._began
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        return Step(seconds, cpu_seconds, prompt_tokens, response_tokens, peak_bytes())


class Peer:
    """The other training, which runs `command` with the environment's variables and `variables`.

    What it prints goes to the file `log`. A context manager: the process ends with it.
    Raises SystemExit with the end of the log where the process ends too soon.
    """

    def __init__(self, command: Sequence[str], log: Path, variables: dict[str, str]) -> None:
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=os.environ | variables,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def ready(self) -> None:
        """Wait until it has built everything."""
        self._answer()

    def step(self) -> Step:
        """Let it take the next step."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        return Step(**self._answer())

    def finish(self) -> None:
        """Wait until it has saved its student, after the last step."""
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        return dict(json.loads(line))

    def _fail(self) -> None:
        self._process.wait()
        last = self._log.read_text().strip().splitlines()[-20:]
        raise SystemExit("\n".join(["the other training has ended:", *last]))


class Turns:
    """The peer's end. What the process prints from here on goes to its stderr."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._watch = Stopwatch()

    def wait(self) -> None:
        """Until the next step is asked for; its time begins. The process ends when nobody asks any more."""
        if not sys.stdin.readline():
            raise SystemExit(1)
        self._watch = Stopwatch()

    def took(self, prompt_tokens: int, response_tokens: int) -> None:
        """Answer: the step is done."""
        self.say(asdict(self._watch.step(prompt_tokens, response_tokens)))

    def say(self, answer: dict[str, Any]) -> None:
        """Send a line; an empty answer says that the peer is ready, or has saved."""
        print(json.dumps(answer), file=self._answers, flush=True)
