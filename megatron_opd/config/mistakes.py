"""Turns what pydantic finds wrong with a configuration into one line for the user."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_opd.config.names import all_keys, did_you_mean, section_at
from megatron_opd.config.schema import Config

_EXPECTED = {  # pydantic's error type -> what the key takes
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "none_required": "null",
}
_RANGES = {"greater_than_equal": "ge", "greater_than": "gt", "less_than_equal": "le", "less_than": "lt"}
_SIGNS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}


def first_mistake(error: ValidationError, path: Path, overrides: Sequence[str]) -> str:
    """The line for the most telling mistake: unknown keys first, for they are why others are missing."""
    found = error.errors(include_url=False)
    unknown = [entry for entry in found if entry["type"] in ("extra_forbidden", "invalid_key")]
    wrong = [entry for entry in found if entry["type"] != "missing"]
    entry = (unknown or wrong or found)[0]
    key = ".".join(str(part) for part in entry["loc"] if part != "[key]")
    line = _describe(key, entry, _source(key, path, overrides))
    others = len({entry["loc"] for entry in found}) - 1
    return f"{line} (and {others} more)" if others else line


def _describe(key: str, entry: Any, source: str) -> str:
    kind, context, value = entry["type"], entry.get("ctx", {}), entry["input"]
    if kind in ("extra_forbidden", "invalid_key"):
        return f"unknown key '{key}' in {source}{did_you_mean(key, _known(key)) or _keys_beside(key)}"
    if kind == "missing":
        return f"missing key '{key}' in {source}: set it there, or give {key}=... on the command line"
    if kind in _RANGES:
        bound = context[_RANGES[kind]]
        return f"{key}: must be {_SIGNS[_RANGES[kind]]} {bound:g}, got {value!r} ({source})"
    if kind == "literal_error":
        return f"{key}: expected {context['expected']}, got {_shown(value)} ({source})"
    if kind in ("model_type", "model_attributes_type"):
        keys = ", ".join((section_at(key) or Config).model_fields)
        return f"{key}: expected a section with the keys {keys}, got {_shown(value)} ({source})"
    if kind in _EXPECTED:
        return f"{key}: expected {_EXPECTED[kind]}, got {_shown(value)} ({source})"
    return f"{key}: {entry['msg']} ({source})"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _known(key: str) -> list[str]:
    """The keys that a misspelt one may stand for, those of an entry of a table among them."""
    section = key.rpartition(".")[0]
    model = section_at(section) if section else None
    return [*all_keys(), *(f"{section}.{name}" for name in (model.model_fields if model is not None else ()))]


def _keys_beside(key: str) -> str:
    section = key.rpartition(".")[0]
    model = section_at(section) or Config
    where = f"section '{section}'" if section else "the top level"
    return f": {where} has the keys {', '.join(model.model_fields)}"


def _source(key: str, path: Path, overrides: Sequence[str]) -> str:
    """The last override that sets `key`, something in it or something around it; else the file."""
    for override in reversed(overrides):
        name = override.partition("=")[0]
        if f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}."):
            return f"override '{override}'"
    return str(path)
