"""Progress of moving many bytes: a bar with bytes per second on a terminal, occasional plain lines elsewhere."""

import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LINE_SECONDS = 10.0  # least time between two plain lines


class ByteProgress:
    """Shows bytes done and to do, bytes per second and the remaining time.

    A context manager; call it as `progress(done, total)`. On a terminal it draws one bar; otherwise it prints a line
    at most every 10 seconds and one at the end. `label` begins the line; `clock` returns seconds.
    """

    def __init__(
        self, label: str, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._label = label
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._began = clock()
        self._line_printed = -math.inf
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        self._began = self._line_printed = self._clock()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` bytes are moved."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
            return
        now = self._clock()
        if done < total and now - self._line_printed < LINE_SECONDS:
            return
        self._line_printed = now
        speed = decimal(round(done / max(now - self._began, 1e-3)))
        text = f"{self._label}  {decimal(done)} of {decimal(total)}  {speed}/s"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
