"""metrics.jsonl (one JSON object a step) and the same numbers as TensorBoard scalars."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
DISCARDED_FILE = "metrics.discarded.jsonl"


class MetricsWriter:
    """Writes a run's metrics; use on rank 0 only.

    `resume_step` is the step of the checkpoint that the run continues from; None starts anew. Lines of later
    steps (all lines when starting anew), left by a run that went on after that checkpoint, are moved to
    metrics.discarded.jsonl, and TensorBoard is told to forget them, so every step counts once.
    """

    def __init__(self, run_dir: Path, resume_step: int | None = None) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        last_kept = -1 if resume_step is None else resume_step
        _cut_back(path, run_dir / DISCARDED_FILE, last_kept)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=last_kept + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append `{"step": step, **values}` and force it to disk. A value that is not finite is written as
        null."""
        row = {"step": step} | {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for name, value in values.items():
            self._board.add_scalar(name if "/" in name else f"train/{name}", value, step)
        self._board.flush()

    def close(self) -> None:
        """Close both outputs."""
        self._file.close()
        self._board.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl in file order; [] when there is none.

    A last line cut short by a killed run is left out.
    """
    return [json.loads(line) for line in _whole_lines(run_dir / METRICS_FILE)]


def _plain(value: float) -> float | int | None:
    value = value if isinstance(value, int) else float(value)
    return value if math.isfinite(value) else None


def _whole_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return lines


def _cut_back(path: Path, discarded: Path, last_kept: int) -> None:
    lines = _whole_lines(path)
    kept = [line for line in lines if json.loads(line)["step"] <= last_kept]
    cut = [line for line in lines if json.loads(line)["step"] > last_kept]
    if cut:
        with discarded.open("a", encoding="utf-8") as file:
            file.writelines(cut)
            file.flush()
            os.fsync(file.fileno())
    if not path.exists():
        return
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
