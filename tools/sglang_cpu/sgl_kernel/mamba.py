"""Kernels of state-space models: none is here."""

from collections.abc import Callable
from typing import NoReturn

from . import refuse


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.endswith("_cpu"):
        return refuse(name)
    raise AttributeError(f"module 'sgl_kernel.mamba' has no attribute {name!r}")
