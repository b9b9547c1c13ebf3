"""Streaming passes over logits shards: statistics and gradients of divergences, without big temporaries.

This file is the only place that chooses the implementation, call by call, by the device of the student's
logits: `triton_streaming` on a GPU where Triton is installed, `torch_streaming` otherwise. Both have the same
signatures; `torch_streaming` documents them. `objectives` imports the names from here. Nothing in this folder
may import anything else of this project or of Megatron: torch and Triton only.
"""

import importlib.util
from collections.abc import Callable
from functools import cache, wraps
from types import ModuleType
from typing import ParamSpec, TypeVar

from megatron_opd.kernels import torch_streaming
from megatron_opd.kernels.torch_streaming import GradientRows, statistic_names

__all__ = ["GradientRows", "gradient", "jsd_statistics", "statistic_names", "statistics"]

P = ParamSpec("P")
R = TypeVar("R")


@cache
def _implementation(device_type: str) -> ModuleType:
    if device_type == "cuda" and importlib.util.find_spec("triton") is not None:
        return importlib.import_module("megatron_opd.kernels.triton_streaming")
    return torch_streaming


def _by_device(function: Callable[P, R]) -> Callable[P, R]:
    """The function of this name of the implementation for the device of the first argument."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        implementation = _implementation(args[0].device.type)  # type: ignore[attr-defined]
        return getattr(implementation, function.__name__)(*args, **kwargs)

    return call


statistics = _by_device(torch_streaming.statistics)
jsd_statistics = _by_device(torch_streaming.jsd_statistics)
gradient = _by_device(torch_streaming.gradient)
