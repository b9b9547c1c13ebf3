"""The bench's small models as folders, and what a rank of a run on them measures; shared by the tests of the plan."""

from dataclasses import astuple
from pathlib import Path
from typing import Any

from megatron_opd.config.layout_checks import processes_of_run
from megatron_opd.config.schema import Config
from megatron_opd.plan.setting import Setting
from tools.bench.plan_check import Sizes, config_of, save_configs

SIZES = Sizes(layers=4, hidden=256, vocab=2000, length=128, batch=4)


def config(folder: Path, sizes: Sizes = SIZES, **overrides: Any) -> Config:
    """A run of these sizes; overrides spell `__` for the dot of a key."""
    folder = folder / "-".join(map(str, astuple(sizes)))
    if not folder.exists():
        folder.mkdir(parents=True)
        save_configs(folder, sizes)
    return config_of(folder, sizes, {key.replace("__", "."): value for key, value in overrides.items()})


def setting_of(planned: Config) -> Setting:
    """On as many CPU processes as the layout needs."""
    return Setting.of(planned, ranks_of(planned), "cpu")


def ranks_of(planned: Config) -> int:
    """Processes of the layouts."""
    return processes_of_run(planned)
