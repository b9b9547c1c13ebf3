"""metrics.jsonl (one JSON object a step) and the same numbers as TensorBoard scalars."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_opd.report.step_lines import StepLines, read_steps

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes a run's metrics; use on rank 0 only.

    `resume_step` is the step of the checkpoint that the run continues from; None starts anew. Lines of later
    steps (all lines when starting anew), left by a run that went on after that checkpoint, are moved to
    metrics.discarded.jsonl, and TensorBoard is told to forget them, so every step counts once.
    """

    def __init__(self, run_dir: Path, resume_step: int | None = None) -> None:
        last_kept = -1 if resume_step is None else resume_step
        self._lines = StepLines(run_dir / METRICS_FILE, last_kept)
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=last_kept + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append `{"step": step, **values}` and force it to disk. A value that is not finite is written as
        null."""
        self._lines.append({"step": step} | {name: _plain(value) for name, value in values.items()})
        self._draw(step, values)

    def complete(self, step: int, values: Mapping[str, float]) -> None:
        """Add values to the last line, which is that of `step`."""
        self._lines.complete({"step": step} | {name: _plain(value) for name, value in values.items()})
        self._draw(step, values)

    def _draw(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name if "/" in name else f"train/{name}", value, step)
        self._board.flush()

    def close(self) -> None:
        """Close both outputs."""
        self._lines.close()
        self._board.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, see `read_steps`."""
    return read_steps(run_dir / METRICS_FILE)


def _plain(value: float) -> float | int | None:
    value = value if isinstance(value, int) else float(value)
    return value if math.isfinite(value) else None
