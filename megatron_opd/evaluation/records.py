"""Rows of a data set that lies on the disk, whichever of the usual forms it has."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from megatron_opd.errors import UserError

Row = Mapping[str, Any]

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_SPLITS = ("train", "test", "validation", "valid", "dev")


def read_records(path: Path, split: str | None) -> list[Row]:
    """All rows of a file or folder in order; of a folder with several splits, of one.

    Raises UserError for what is not there, cannot be read or holds nothing, and when a split has to be named.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    rows = _of_folder(path, split) if path.is_dir() else _of_file(path)
    if not rows:
        raise UserError(f"{path} holds no problems")
    return rows


def _of_folder(path: Path, split: str | None) -> list[Row]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, split)
    # In hidden folders are what a hub's client keeps for itself.
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in SUFFIXES and not any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.name not in ("dataset_infos.json", "dataset_info.json")
    )
    if not files:
        raise UserError(f"{path} holds no {', '.join(SUFFIXES)} file")
    splits = {name for file in files for name in _SPLITS if _of_split(file.relative_to(path), name)}
    if split is not None:
        chosen = [file for file in files if _of_split(file.relative_to(path), split)]
        if not chosen:
            raise UserError(
                f"{path}: no file's name has the split {split!r}; it has {', '.join(sorted(splits)) or 'none'}"
            )
        files = chosen
    elif len(splits) > 1:
        raise UserError(f"{path} has the splits {', '.join(sorted(splits))}: name one with `split`")
    return [row for file in files for row in _of_file(file)]


def _of_split(file: Path, split: str) -> bool:
    """By the name of the file (test.jsonl, test-00000-of-00001.parquet) or of a folder around it."""
    stem = file.name.split(".")[0]
    return split in file.parts[:-1] or stem == split or stem.startswith((f"{split}-", f"{split}_"))


def _saved(path: Path, split: str | None) -> list[Row]:
    """What `save_to_disk` of a data set, or of several splits, wrote."""
    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        if split is None and len(found) > 1:
            raise UserError(f"{path} has the splits {', '.join(found)}: name one with `split`")
        if split is not None and split not in found:
            raise UserError(f"{path} has no split {split!r}; it has {', '.join(found)}")
        found = found[split or next(iter(found))]
    return list(found)


def _of_file(file: Path) -> list[Row]:
    if file.suffix == ".jsonl":
        return list(_json_lines(file))
    if file.suffix == ".json":
        return _json_list(file)
    if file.suffix == ".parquet":
        kind = datasets.Dataset.from_parquet
    elif file.suffix == ".csv":
        kind = datasets.Dataset.from_csv
    else:
        raise UserError(f"{file}: problems are read from {', '.join(SUFFIXES)} files, or folders of them")
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return list(kind(str(file), keep_in_memory=True))
    except Exception as error:  # pyarrow and pandas have many
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0][:200]}") from None
    finally:
        if bars:
            datasets.enable_progress_bars()


def _json_lines(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}, line {number}: not valid JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{file}, line {number}: not an object")
            yield row


def _json_list(file: Path) -> list[Row]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return list(_json_lines(file))  # JSON lines, which some call .json
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file}: neither a list of objects nor one object a line")
    return rows


def column_of(rows: Sequence[Row], given: str | None, usual: Sequence[str], what: str) -> str:
    """The column that is `given`, else the first of the `usual` names that the rows have, whatever its case.

    Raises UserError naming the columns that there are.
    """
    for name in (given,) if given is not None else usual:
        found = _name_in(rows[0], name)
        if found is not None:
            return found
    asked = given if given is not None else ", ".join(usual)
    raise UserError(f"no column for the {what} ({asked}); there are {', '.join(rows[0])}")


def value_of(row: Row, column: str) -> Any:
    """The value of a column, where a dot leads into an object; None where it is missing."""
    value: Any = row
    for part in [column] if column in row else column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _name_in(row: Row, name: str) -> str | None:
    lowered = {column.lower(): column for column in row}
    if name in row:
        return name
    if name.lower() in lowered:
        return lowered[name.lower()]
    return name if "." in name and value_of(row, name) is not None else None
