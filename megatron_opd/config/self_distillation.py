"""Self-distillation: what the keys of a teacher with prompts of its own, or that follows the student, need.

Pure functions of plain values. Each raises UserError with one line that names the key and the remedy.
"""

from dataclasses import fields
from string import Formatter
from typing import Any

from megatron_opd.config.schema import Config
from megatron_opd.errors import UserError

_TEMPLATE = "teacher.prompt_template"


def template_fields(template: str) -> list[str]:
    """The names in braces, each once, in order."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{_TEMPLATE}: {error}: write braces of the text as {{{{ and }}}}") from None
    names: dict[str, None] = {}
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if form or conversion or not name or set(name) & set(".[]{}"):
            raise UserError(
                f"{_TEMPLATE}: {name or 'an empty pair of braces'} is not the name of a field: write {{name}} alone, "
                "and braces of the text as {{ and }}"
            )
        names[name] = None
    if not names:
        raise UserError(f"{_TEMPLATE}: names no field, all prompts would be the same: add one, as {{prompt}}")
    return list(names)


def check_self_distillation(config: Config) -> None:
    """Conditions between the teacher's prompts, its moving weights and other keys."""
    teacher = config.teacher
    if teacher.prompt_template is not None:
        template_fields(teacher.prompt_template)
    elif teacher.max_prompt_tokens is not None:
        raise UserError(
            f"teacher.max_prompt_tokens: read with {_TEMPLATE} only: give that, or use data.max_prompt_tokens"
        )
    for key in ("prompt_template", "ema"):
        if teacher.parallel is not None and getattr(teacher, key) is not None:
            raise UserError(
                f"teacher.{key}: needs the teacher in the student's layout: leave teacher.parallel null, or this"
            )
    if teacher.ema is None:
        return
    if teacher.paths:
        raise UserError("teacher.ema: one teacher follows the student: give teacher.path, or leave it null")
    if teacher.engine == "sglang":
        raise UserError(
            "teacher.ema: servers keep the weights that they were started with: set teacher.engine to megatron, or "
            "leave it null"
        )
    if teacher.offload:
        raise UserError("teacher.ema: weights in host memory do not move: set teacher.offload to false")
    if config.optimizer.cpu_offload:
        raise UserError(
            "teacher.ema: follows the float32 weights, which are in host memory: set optimizer.cpu_offload to false"
        )


def check_same_model(student: Any, teacher: Any) -> None:
    """A teacher that moves towards the student has its architecture; both are `Architecture`s."""
    for field in fields(student):
        ours, theirs = getattr(student, field.name), getattr(teacher, field.name)
        if ours != theirs:
            raise UserError(
                f"teacher.ema: needs a teacher of the student's architecture, but its {field.name} is {theirs}, not "
                f"{ours}: set teacher.path to student.path, or leave it null"
            )
