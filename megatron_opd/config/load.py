"""Reads a run's configuration: YAML file, `a.b=value` overrides, preset, types. And writes it back, resolved.

Later sources win: defaults < preset < file < overrides, left to right. `${a.b}` stands for the value of
another key, defaults and preset included. Every mistake is a UserError of one line that names the key or the
file.
"""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from megatron_opd.config.mistakes import first_mistake
from megatron_opd.config.names import sections
from megatron_opd.config.presets import preset_objective
from megatron_opd.config.schema import Config
from megatron_opd.errors import UserError

Tree = dict[str, Any]
RESOLVED = "config.yaml"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the YAML file `path` with `overrides` (`a.b=value`, the value read as YAML)
    applied.

    Relative paths inside it are relative to the current directory. Raises UserError for a missing or broken
    file, an unknown, missing or ill-typed key, a value out of range, and an override that is not `key=value`.
    """
    path = Path(path)
    given = _read_yaml(path)
    for override in overrides:
        given = _merged(given, _parse_override(override))
    given = _without_empty_sections(given)
    name = _resolved(_merged(_defaults(Config), given), path)["objective"]
    name = name.get("preset") if isinstance(name, dict) else None
    preset = {"objective": preset_objective(name)} if isinstance(name, str) else {}
    values = _resolved(_merged(_merged(_defaults(Config), preset), given), path)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(first_mistake(error, path, overrides)) from None


def save_resolved(config: Config, run_dir: Path) -> Path:
    """Writes `run_dir/config.yaml` with every key of `config`; `load_config` of it gives an equal config.

    The file appears whole or not at all. Makes `run_dir` when it is missing. Raises UserError when it cannot
    be written.
    """
    text = OmegaConf.to_yaml(OmegaConf.create(_escaped(config.model_dump(mode="json"))))
    target = run_dir / RESOLVED
    aside = run_dir / f".{RESOLVED}.{os.getpid()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
    return target


def _read_yaml(path: Path) -> Tree:
    try:
        content = OmegaConf.load(path)
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_line(error)}: not valid YAML: {_problem(error)}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_first_line(error)}") from None
    tree = OmegaConf.to_container(content, resolve=False)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections and keys at the top level, got a list")
    return {str(key): value for key, value in tree.items()}


def _parse_override(override: str) -> Tree:
    key, equals, value = override.partition("=")
    if not equals or not all(re.fullmatch(r"\w+", part) for part in key.split(".")):
        raise UserError(f"override '{override}': expected key=value, such as optimizer.lr=1e-5")
    try:
        tree = OmegaConf.to_container(OmegaConf.from_dotlist([override]), resolve=False)
    except yaml.YAMLError as error:
        raise UserError(f"override '{override}': {value!r} is not valid YAML: {_problem(error)}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"override '{override}': {_first_line(error)}") from None
    assert isinstance(tree, dict)
    return {str(name): content for name, content in tree.items()}


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark else ""


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def changed_keys(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for every key in which two configurations differ."""

    def flat(tree: Tree, prefix: str = "") -> Tree:
        leaves: Tree = {}
        for key, value in tree.items():
            leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return leaves

    before, after = flat(old.model_dump(mode="json")), flat(new.model_dump(mode="json"))
    # A section that is null in one of them has no keys there, and no line of its own in the other.
    keys = [key for key in (after | before) if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys]


def _defaults(model: type[BaseModel]) -> Tree:
    """The default of every key below `model` that has one; sections that may not be null are there even when
    empty."""
    inner = dict(sections(model))
    tree: Tree = {}
    for name, field in model.model_fields.items():
        if name in inner and (field.is_required() or field.default is not None):
            tree[name] = _defaults(inner[name])
        elif not field.is_required():
            tree[name] = field.default
    return tree


def _merged(below: Tree, above: Tree) -> Tree:
    """`below` with the keys of `above` put over it, section by section."""
    both = dict(below)
    for key, value in above.items():
        old = both.get(key)
        both[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def _without_empty_sections(tree: Tree) -> Tree:
    """`tree` without the sections that are written down with nothing in them, which YAML reads as null."""
    names = {name for name, _ in sections()}

    def prune(subtree: Tree, prefix: str) -> Tree:
        kept = {
            key: value
            for key, value in subtree.items()
            if value is not None or prefix + str(key) not in names
        }
        return {
            key: prune(value, f"{prefix}{key}.") if isinstance(value, dict) else value
            for key, value in kept.items()
        }

    return prune(tree, "")


def _resolved(tree: Tree, path: Path) -> Tree:
    """`tree` with every `${...}` replaced by its value."""
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        missing = isinstance(error, MissingMandatoryValue)
        problem = "'???' stands for a value that has to be given" if missing else _first_line(error)
        raise UserError(f"{where}{problem} (in {path} or on the command line)") from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _escaped(value: Any) -> Any:
    """`value` with every literal `${` in its strings written so that reading it back gives it unchanged."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value
