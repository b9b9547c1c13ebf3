"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gloo_pool import GlooPools

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def gloo() -> Iterator[GlooPools]:
    """`gloo(world_size, fn, *args, **kwargs)`: the results of `fn` on every rank (see tests/gloo_pool.py)."""
    pools = GlooPools()
    yield pools
    pools.close()
