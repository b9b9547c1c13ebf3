"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.gloo_pool import GlooPools
from tests.sglang_server import sglang
from tests.training.tiny_run import save_pair

__all__ = ["sglang"]

hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")  # no test depends on how fast or how busy the machine is
torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests marked `full` to `make test-full`, and put the longest files first.

    `make test` gives whole files to several processes: one that takes minutes must not begin last. Those are the
    files of whole runs and of tests that ask SGLang.
    """
    if not os.environ.get("MEGATRON_OPD_FULL"):
        full = {item for item in items if item.get_closest_marker("full")}
        config.hook.pytest_deselected(items=list(full))
        items[:] = [item for item in items if item not in full]
    runs = {item.path for item in items if item.path.parent == Path(__file__).parent}
    served = {item.path for item in items if "sglang" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in runs | served)


@pytest.fixture(scope="session")
def gloo() -> Iterator[GlooPools]:
    """`gloo(world_size, fn, *args, **kwargs)`: the results of `fn` on every rank (see tests/gloo_pool.py)."""
    pools = GlooPools()
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what `save_pair` saves: students and a teacher of other sizes."""
    folder = tmp_path_factory.mktemp("models")
    save_pair(folder)
    return folder
