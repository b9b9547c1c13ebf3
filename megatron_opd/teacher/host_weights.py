"""Keeps the weights of a frozen model in host memory and lends them to its device for a forward pass."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class HostWeights:
    """Parameters that lie in host memory, pinned where `device` is a GPU, but inside `on_device()`.

    They are never written: leaving `on_device()` drops the device's copy and moves nothing.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], device: torch.device) -> None:
        self._device = device
        self._weights: list[tuple[torch.nn.Parameter, Tensor]] = []
        for parameter in parameters:
            host = parameter.data.cpu()
            parameter.data = host.pin_memory() if device.type == "cuda" else host
            self._weights.append((parameter, parameter.data))

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, all parameters are on the device; the copies are queued on its current stream."""
        for parameter, host in self._weights:
            parameter.data = host.to(self._device, non_blocking=True, copy=True)
        try:
            yield
        finally:
            for parameter, host in self._weights:
                parameter.data = host
