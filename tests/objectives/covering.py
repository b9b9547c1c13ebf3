"""Settings of a product of axes for pytest: enough of them to meet every pair of values, the others marked `full`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest


def covering(allowed: Callable[[dict[str, Any]], bool] = lambda _: True, **axes: Any) -> list[Any]:
    """One pytest parameter, a dict, for each allowed combination of the axes' values.

    The first ones cover every pair of values that an allowed combination has; what is left of the product runs
    with MEGATRON_OPD_FULL=1.
    """
    product = [
        dict(zip(axes, values, strict=True)) for values in itertools.product(*map(tuple, axes.values()))
    ]
    settings = [setting for setting in product if allowed(setting)]
    pairs = [_pairs(setting) for setting in settings]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(settings)), key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        chosen.append(best)
    rest = [i for i in range(len(settings)) if i not in set(chosen)]
    return [
        *(pytest.param(settings[i], id=_name(settings[i])) for i in chosen),
        *(pytest.param(settings[i], id=_name(settings[i]), marks=pytest.mark.full) for i in rest),
    ]


def _pairs(setting: dict[str, Any]) -> set[Any]:
    return set(itertools.combinations([(name, str(value)) for name, value in setting.items()], 2))


def _name(setting: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in setting.items())
