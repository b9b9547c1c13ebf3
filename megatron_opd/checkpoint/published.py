"""How checkpoints appear in a run's folder and go again: complete or not at all, checksummed, as many as are kept.

A checkpoint is written as `.writing_step_...` and renamed when complete, so a save cut short is never picked up.
`latest` is a link for people; resuming looks at the folders themselves. No collectives: one process calls all this.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.checkpoint.checksums import first_damaged_file, write_checksums
from megatron_opd.checkpoint.weights import STATE, copy_model_files
from megatron_opd.errors import UserError

_PREFIX, _ASIDE, _LATEST = "step_", ".writing_", "latest"


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept: the newest `keep_last`, and for good those of every `keep_every` steps (0: none)."""

    keep_last: int
    keep_every: int = 0

    def apply(self, folder: Path) -> None:
        """Delete the others."""
        for old in published(folder)[: -self.keep_last]:
            if not self.keep_every or step_of(old) % self.keep_every:
                shutil.rmtree(old)


def folder_of_step(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"{_PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The inverse of `folder_of_step`."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def aside_of_step(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is while it is being written."""
    return folder / f"{_ASIDE}{folder_of_step(folder, step).name}"


def published(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}[0-9]*") if path.is_dir())


def publish(
    aside: Path, final: Path, model_folder: Path, run_state: Mapping[str, Any], known: Mapping[str, str]
) -> None:
    """Make a checkpoint of what is complete in `aside` but for what is beside the state; `latest` leads to it.

    `known` are checksums of files of the state, by name: these files are not read again.
    """
    copy_model_files(model_folder, aside)
    (aside / "run.json").write_text(json.dumps(run_state, indent=1))
    write_checksums(aside, aside.rglob("*"), {aside / STATE / name: found for name, found in known.items()})
    for path in aside.rglob("*"):
        _sync(path)
    _sync(aside)
    shutil.rmtree(final, ignore_errors=True)  # a later lineage saves the same step again
    os.replace(aside, final)
    link = final.with_name(f"{_ASIDE}{_LATEST}")
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, final.with_name(_LATEST))
    _sync(final.parent)


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint whose files all match their checksums; None when there are no checkpoints.

    Newer ones that are damaged are named and renamed `damaged_step_...`, and what a save cut short has left is removed.
    Raises UserError, and renames nothing, when all are damaged: starting anew would throw the run away.
    """
    for cut_short in folder.glob(f"{_ASIDE}{_PREFIX}*"):
        shutil.rmtree(cut_short, ignore_errors=True)
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(published(folder)):
        file = first_damaged_file(checkpoint)
        if file is None:
            for newer, damage in damaged.items():
                aside = newer.with_name(f"damaged_{newer.name}")
                shutil.rmtree(aside, ignore_errors=True)
                newer.rename(aside)
                print(f"warning: checkpoint {newer} is damaged ({damage}): now {aside.name}", file=sys.stderr)
            return checkpoint
        damaged[checkpoint] = file
    if damaged:
        names = ", ".join(f"{checkpoint.name} ({file})" for checkpoint, file in damaged.items())
        raise UserError(f"{folder}: no intact checkpoint: {names}; restore one, or start with a new run_dir")
    return None


def _sync(path: Path) -> None:
    """Bring a file or directory to the disk, so that the rename that publishes it cannot come before it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
