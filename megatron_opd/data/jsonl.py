"""Reads columns of a JSONL file, or of every JSONL file in a folder, through `datasets`.

`datasets` and pyarrow report a bad file without its line number; here the line is looked up and named.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from megatron_opd.errors import UserError


def read_rows(
    path: Path, field: str, texts: Sequence[str] = (), *, key: str = "data.prompt_field"
) -> list[tuple[str, dict[str, Any]]]:
    """The values of `field` and of the fields `texts` in file order (the files of a folder in the order of their
    names), each row with the place it came from ("prompts.jsonl, line 3"); blank lines skipped.

    A value of `field` is a string or a list, those of `texts` are strings. Raises UserError naming the file, the line
    and the remedy for a missing path, a broken line, an absent field (`key` is what names `field` in the
    configuration) and a value of another type.
    """
    values = [
        placed
        for file in _jsonl_files(path)
        for placed in _with_places(file, _read_file(file, field, texts, key))
    ]
    if not values:
        raise UserError(
            f"{path}: holds no prompts; data.prompts and evaluation.prompts need at least one line each"
        )
    return values


def _jsonl_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise UserError(f"{path}: this folder holds no *.jsonl file")
        return files
    if not path.is_file():
        raise UserError(f"{path}: no such prompt file or folder; check data.prompts and evaluation.prompts")
    if path.suffix not in (".jsonl", ".json"):
        raise UserError(f"{path}: prompts are read from .jsonl files or a folder of them")
    return [path]


def _read_file(file: Path, field: str, texts: Sequence[str], key: str) -> list[dict[str, Any]]:
    if not any(True for _ in _lines(file)):
        return []
    verbosity = datasets.logging.get_verbosity()
    bars_shown = datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        # A cache of its own: a shared one would grow with every edit of the file and be fought over by ranks.
        with tempfile.TemporaryDirectory() as cache:
            table = datasets.load_dataset(
                "json", data_files=[str(file)], split="train", cache_dir=cache, keep_in_memory=True
            )
            names = [field, *texts]
            rows = None
            if set(names) <= set(table.column_names):
                columns = [list(table[name]) for name in names]
                rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise _explain(file, field, texts, key) or UserError(
            f"{file}: not readable as JSONL ({error})"
        ) from None
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars_shown:
            datasets.enable_progress_bars()
    if rows is None or not all(_fits(row, field, texts) for row in rows):
        raise _explain(file, field, texts, key) or UserError(
            f"{file}: field {field!r} must be text or a list of chat messages"
            + (f", and text {', '.join(texts)} (teacher.prompt_template)" if texts else "")
        )
    return rows


def _fits(row: dict[str, Any], field: str, texts: Sequence[str]) -> bool:
    return isinstance(row[field], str | list) and all(isinstance(row[name], str) for name in texts)


def _with_places(file: Path, values: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    numbers = [number for number, _ in _lines(file)]
    if len(numbers) == len(values):
        places = (f"{file}, line {number}" for number in numbers)
    else:  # `datasets` also reads a JSON list and objects that span lines
        places = (f"{file}, object {number}" for number in range(1, len(values) + 1))
    return zip(places, values, strict=True)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their 1-based numbers."""
    try:
        with file.open(encoding="utf-8") as lines:
            yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text; prompt files are JSONL in UTF-8") from None


def _explain(file: Path, field: str, texts: Sequence[str], key: str) -> UserError | None:
    """The first line that cannot be a prompt, as an error that names it; None when every line looks right."""
    for number, line in _lines(file):
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            return UserError(
                f"{where}: not valid JSON ({error.msg} at column {error.colno}); mend or remove the line"
            )
        if not isinstance(row, dict):
            return UserError(
                f"{where}: not a JSON object; every line must be an object with the field {field!r}"
            )
        if row.get(field) is None:
            names = ", ".join(sorted(row)) or "none"
            return UserError(f"{where}: no field {field!r} (there are: {names}); set {key} to the right one")
        if not isinstance(row[field], str | list):
            kind = type(row[field]).__name__
            return UserError(
                f"{where}: field {field!r} is {kind}; it must be text or a list of chat messages"
            )
        for name in texts:
            if not isinstance(row.get(name), str):
                kind = "is missing" if row.get(name) is None else f"is {type(row[name]).__name__}"
                return UserError(
                    f"{where}: field {name!r} {kind}; teacher.prompt_template needs text there in every line"
                )
    return None
