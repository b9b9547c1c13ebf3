"""Names of the configuration keys as a user writes them, and the nearest one to a misspelt name."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from megatron_opd.config.schema import Config


def sections(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Dotted name and model of every section below `model`, outer ones first, those that may be null included."""
    for name, field in model.model_fields.items():
        for section in _section_of(field.annotation):
            yield prefix + name, section
            yield from sections(section, f"{prefix}{name}.")


def _section_of(annotation: Any) -> list[type[BaseModel]]:
    """The model behind `Section` or `Section | None`; nothing for a key that is not a section, a table of them say."""
    if get_origin(annotation) is dict:
        return []
    choices = (annotation, *get_args(annotation))
    return [choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)]


def section_at(name: str) -> type[BaseModel] | None:
    """The section of a dotted name, which may be an entry of a table of sections; None where there is none."""
    model: Any = Config
    for part in name.split(".") if name else ():
        if get_origin(model) is dict:
            model = get_args(model)[1]
            continue
        field = model.model_fields.get(part)
        if field is None:
            return None
        model = next(iter(_section_of(field.annotation)), field.annotation)
        if not (_section_of(model) or get_origin(model) is dict):
            return None
    found: list[type[BaseModel]] = _section_of(model)
    return found[0] if found else None


def all_keys() -> list[str]:
    """Dotted names of every section and every key."""
    inner = [f"{name}.{key}" for name, model in sections() for key in model.model_fields]
    return [*Config.model_fields, *inner]


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """`: did you mean '...'?` with the nearest of the dotted names `known`, or nothing when none is near.

    Near are, in this order: a similar name in the same section, the same name in another section, a similar
    name anywhere.
    """
    section, _, last = name.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    near = [siblings[key] for key in difflib.get_close_matches(last, siblings, n=1)]
    near = near or [key for key in known if key.rpartition(".")[2] == last]
    others = [key for key in known if not name.startswith(f"{key}.")]
    near = near or difflib.get_close_matches(name, others, n=1, cutoff=0.8)
    return f": did you mean '{near[0]}'?" if near else ""
