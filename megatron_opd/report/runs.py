"""A run directory as the report reads it: its settings, and the rows and samples that its training has written."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_opd.errors import UserError
from megatron_opd.report.metrics import METRICS_FILE
from megatron_opd.report.positions import POSITIONS_FILE
from megatron_opd.report.step_lines import read_steps

Decode = Callable[[list[int]], str]
PHASES = {  # metric -> what a step spends its time on
    "rollout_seconds": "rollout",
    "teacher_seconds": "teacher",
    "train_seconds": "training",
    "sync_seconds": "weight sync",
    "save_seconds": "saving",
}


@dataclass(frozen=True)
class Run:
    """What is known of a run. `rows` and `positions` are in the order of the steps."""

    name: str
    folder: Path
    config: Mapping[str, Any]  # dotted keys
    rows: Sequence[Mapping[str, Any]]
    positions: Sequence[Mapping[str, Any]]
    sample_files: Mapping[int, Path] = field(default_factory=dict)  # step -> file

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it is a number."""
        points = [(row["step"], row[name]) for row in self.rows if _is_number(row.get(name))]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def steps(self) -> list[Mapping[str, Any]]:
        """The rows of optimizer steps, without that of the evaluation before them."""
        return [row for row in self.rows if row["step"] > 0]

    @property
    def metrics(self) -> list[str]:
        """Every metric that is a number somewhere, in the order in which they first appear."""
        return list(dict.fromkeys(name for row in self.rows for name in row if _is_number(row[name])))

    def samples(self, step: int) -> list[dict[str, Any]]:
        """The kept rollouts of a step as they were written. UserError for a damaged file."""
        return list(_samples(self.sample_files[step]))


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs, named by their folders. UserError naming what is missing or damaged."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = ["/".join(folder.resolve().parts[-2:]) for folder in folders]
    for name, folder in zip(names, folders, strict=True):
        if names.count(name) > 1:
            raise UserError(
                f"{folder}: given twice, or another run has the same name; rename one of the folders"
            )
    return [load_run(folder, name) for name, folder in zip(names, folders, strict=True)]


def load_run(folder: Path, name: str) -> Run:
    """One run. UserError naming what is missing or damaged."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run directory")
    for needed in (METRICS_FILE, "config.yaml"):
        if not (folder / needed).is_file():
            raise UserError(f"{folder}: not the directory of a training, it holds no {needed}")
    rows = _steps(folder / METRICS_FILE)
    if not rows:
        raise UserError(f"{folder / METRICS_FILE}: holds no step yet; train at least one step first")
    files = {}
    for path in sorted((folder / "rollouts").glob("step_*.jsonl")):
        digits = path.stem.removeprefix("step_")
        if digits.isdigit():
            files[int(digits)] = path
    return Run(
        name, folder, _config(folder / "config.yaml"), rows, _positions(folder / POSITIONS_FILE), files
    )


def _steps(path: Path) -> list[dict[str, Any]]:
    try:
        rows = read_steps(path)
    except ValueError as error:
        raise UserError(
            f"{path}: damaged, a line is not valid JSON ({error}); mend or remove that line"
        ) from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(
                f'{path}, line {number}: an object with a "step" is expected; mend or remove that line'
            )
    return rows


def _positions(path: Path) -> list[dict[str, Any]]:
    rows = _steps(path)
    for number, row in enumerate(rows, start=1):
        try:
            for where in ("relative", "absolute"):
                lengths = {len(values) for values in row[where].values()}
                if len(lengths) > 1 or "tokens" not in row[where]:
                    raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(
                f"{path}, line {number}: damaged, not values by position; remove that line"
            ) from None
    return rows


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            record = json.loads(line)
            if not {"response_ids", "prompt", "response"} <= record.keys():
                raise ValueError("no sampled rollout")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: damaged ({error}); remove that file") from None
        yield record


def _config(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{path}: damaged, not valid YAML") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: damaged, holds no settings")
    return dict(_dotted(loaded, ""))


def _dotted(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
