"""A JSONL file with one object a step that a resumed run continues, so that every step counts once."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class StepLines:
    """Appends objects with a "step"; use on rank 0 only.

    Lines of steps after `last_kept`, left by a run that went on after the checkpoint of that step, are moved to
    NAME.discarded.jsonl beside the file.
    """

    def __init__(self, path: Path, last_kept: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_back(path, path.with_suffix(".discarded.jsonl"), last_kept)
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one object and force it to disk."""
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def complete(self, row: Mapping[str, Any]) -> None:
        """Put the last object, one of the same step, with these entries too in its place."""
        self.close()
        *lines, last = _whole_lines(self._path)
        found = json.loads(last)
        assert found["step"] == row["step"], "only the last step can be completed"
        _replace(self._path, [*lines, json.dumps({**found, **row}, allow_nan=False) + "\n"])
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The objects in file order; [] when there is no file. A last line cut short by a killed run is left out."""
    return [json.loads(line) for line in _whole_lines(path)]


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
    _replace(path, kept)


def _replace(path: Path, lines: list[str]) -> None:
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
