"""Rotary position embeddings: what config.json says about them, and their frequencies as transformers computes them.

Kinds: `default`, `linear` (positions divided by a factor), `llama3` (long wavelengths divided) and `yarn` (long
wavelengths divided, queries and keys scaled). Others depend on the length of the sequence and are refused.
"""

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_opd.errors import UserError

_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
_NOT_NUMBERS = {
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
}


@dataclass(frozen=True)
class RopeSettings:
    """Kind, base, and the numbers of the kind under transformers' names (empty for `default`)."""

    theta: float = 10000.0
    kind: str = "default"
    numbers: Mapping[str, float] = field(default_factory=dict, hash=False)

    def frequencies(self, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
        """(Angle of a position step for each pair of channels, float32 [D / 2]; factor of queries and keys)."""
        if self.kind == "default":
            return 1.0 / (self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim)), 1.0
        config: Any = types.SimpleNamespace(
            rope_parameters={"rope_type": self.kind, "rope_theta": self.theta, **self.numbers},
            head_dim=head_dim,
            hidden_size=head_dim,  # read beside head_dim, to no effect
            num_attention_heads=1,
            max_position_embeddings=max_positions,
            standardize_rope_params=lambda: None,  # they are in transformers' present form already
        )
        frequencies, factor = ROPE_INIT_FUNCTIONS[self.kind](config, torch.device("cpu"))
        return frequencies, float(factor)


def read_rope(config: Mapping[str, Any], where: str) -> RopeSettings:
    """The settings in a config.json, in either spelling (`rope_scaling` with `rope_theta`, or `rope_parameters`).

    Raises UserError, with `where` in front, for an unsupported kind, a missing or odd number, and rotation of a part
    of the channels.
    """
    given = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in _REQUIRED:
        known = ", ".join(_REQUIRED)
        raise UserError(f"{where}: RoPE scaling '{kind}' is not supported; supported: {known}")
    if given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor other than 1 is not supported")
    theta = given.get("rope_theta") or config.get("rope_theta") or 10000.0
    return RopeSettings(_number(theta, "rope_theta", where), kind, _numbers(config, given, kind, where))


def _numbers(config: Mapping[str, Any], given: Mapping[str, Any], kind: str, where: str) -> dict[str, float]:
    required = _REQUIRED[kind]
    known = {*required, *_OPTIONAL.get(kind, ())}
    for key in given:
        if key not in known | _NOT_NUMBERS:
            raise UserError(f"{where}: RoPE scaling '{kind}' with {key} is not supported: remove that key")
    numbers: dict[str, float] = {}
    if kind in ("llama3", "yarn"):
        key = "original_max_position_embeddings"
        original = config.get(key) or given.get(key) or config.get("max_position_embeddings", 2048)
        numbers[key] = _number(original, key, where)
    for key in sorted(known & given.keys()):
        if given[key] is not None:
            numbers[key] = given[key] if key == "truncate" else _number(given[key], key, where)
    for key in required:
        if key not in numbers:
            raise UserError(f"{where}: RoPE scaling '{kind}' lacks the number '{key}'")
    return numbers


def _number(value: Any, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{where}: {key} of RoPE has to be a number above 0, not {value!r}")
    return value
