"""The checks of a run that need no process group: made before processes start, and again by each of them."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_opd.config.checks import check_layout
from megatron_opd.config.schema import Config, ParallelConfig
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import Architecture, read_architecture


@dataclass(frozen=True)
class Checked:
    """What the checks found out on the way. `parallel.data` is filled in."""

    student: Architecture
    teacher: Architecture
    parallel: ParallelConfig


def check_before_start(config: Config, world_size: int) -> Checked:
    """Checks that `config` can run on `world_size` processes.

    Raises UserError for a missing or unsupported model, a layout that does not fit, or a missing prompt file.
    """
    if config.run_dir.exists() and not config.run_dir.is_dir():
        raise UserError(f"run_dir: {config.run_dir} is a file, not a folder")
    student = _architecture("student.path", config.student.path)
    teacher = _architecture("teacher.path", config.teacher.path)
    parallel = check_layout(config, student, teacher, world_size)
    for key, path in (
        ("data.prompts", config.data.prompts),
        ("evaluation.prompts", config.evaluation.prompts),
    ):
        if path is not None and not path.exists():
            raise UserError(f"{key}: {path} does not exist")
    return Checked(student, teacher, parallel)


def _architecture(key: str, folder: Path) -> Architecture:
    try:
        return read_architecture(folder)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def check_devices(processes: int) -> None:
    """Raises UserError when this machine has GPUs, but fewer than `processes`."""
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and gpus < processes:
        raise UserError(f"parallel: {processes} processes need {processes} GPUs, but this machine has {gpus}")
