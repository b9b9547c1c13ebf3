"""Checks before the start that depend on the machine."""

from __future__ import annotations

import pytest
import torch

from megatron_opd.errors import UserError
from megatron_opd.preflight import check_devices


@pytest.mark.parametrize(("gpus", "processes", "fits"), [(0, 4, True), (4, 4, True), (4, 5, False)])
def test_one_gpu_for_every_process_where_there_are_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: int, processes: int, fits: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if fits:
        check_devices(processes)
    else:
        with pytest.raises(UserError, match="5 processes need 5 GPUs, but this machine has 4"):
            check_devices(processes)
