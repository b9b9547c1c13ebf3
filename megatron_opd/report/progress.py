"""Live progress of a run on rank 0: a bar on a terminal, occasional plain lines elsewhere."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

LINE_SECONDS = 10.0  # least time between two plain lines
WINDOW = 10  # steps that the step time is taken over


class TrainingProgress:
    """Shows step, loss, reverse KL, tokens per second, the time of a step and the remaining time.

    A step takes the sum of its metrics that end in `_seconds` (rollout, teacher, ...), where there are any. The
    remaining time is reckoned from one update to the next, with evaluations and checkpoints between them.

    A context manager. On a terminal it draws one bar; otherwise it prints a line for the first and the last
    step and at most one every 10 seconds in between, so that log files stay short. `say` prints a line in
    either case.

    `first_step` is the number of steps already done (a resumed run). `clock` returns seconds.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._first = first_step
        self._console = console or Console()
        self._clock = clock
        self._step_seconds: deque[float] = deque(maxlen=WINDOW)
        self._wall_seconds: deque[float] = deque(maxlen=WINDOW)
        self._updated = clock()
        self._line_printed = -math.inf
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        self._updated = self._clock()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, completed=self._first, numbers="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step `step` (1-based) is done; `metrics` is its row: `loss`, `reverse_kl` or its estimate and
        `tokens` are shown if there."""
        now = self._clock()
        wall = now - self._updated
        phases = [value for name, value in metrics.items() if name.endswith("_seconds")]
        self._step_seconds.append(sum(phases) if phases else wall)
        # Before the first update the time includes the start of the run.
        self._wall_seconds.append(wall if self._wall_seconds else self._step_seconds[0])
        self._updated = now
        numbers = self._numbers(step, metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
            return
        due = now - self._line_printed >= LINE_SECONDS
        if due or step in (self._first + 1, self._total):
            self._line_printed = now
            self.say(f"step {step}/{self._total}  {numbers}")

    def say(self, text: str) -> None:
        """Print one line (above the bar, where there is one)."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _numbers(self, step: int, metrics: Mapping[str, float]) -> str:
        parts = [
            f"{name} {metrics[key]:.4f}"
            for name, key in (
                ("loss", "loss"),
                ("reverse_kl", "reverse_kl"),
                ("reverse_kl", "reverse_kl_sampled"),
            )
            if key in metrics
        ]
        if "tokens" in metrics and self._step_seconds[-1] > 0:
            parts.append(f"{metrics['tokens'] / self._step_seconds[-1]:.0f} tokens/s")
        parts.append(f"{statistics.median(self._step_seconds):.2f} s/step")
        remaining = statistics.median(self._wall_seconds) * (self._total - step)
        parts.append(f"ETA {format_duration(remaining)}")
        return "  ".join(parts)


def format_duration(seconds: float) -> str:
    """`0:42`, `12:05` or `3:04:05`."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
