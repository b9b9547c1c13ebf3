"""How a new folder comes into being: written aside, then renamed, so that it is complete or not there."""

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_opd.errors import UserError, why_refused

# What megatron-core's writer logs as an error also reaches us as an exception, and the user as one line.
logging.getLogger("megatron.core.dist_checkpointing.strategies.filesystem_async").setLevel(logging.CRITICAL)


def hold(folder: Path) -> None:
    """Keep a folder to this process until it ends. Raises UserError when another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(
        folder / ".lock", os.O_CREAT | os.O_RDWR
    )  # stays open, and so locked, as long as the process
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(
            f"{folder} is in use by another process: wait for it, or give another run_dir"
        ) from None


@contextmanager
def written_aside(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """`with written_aside(folder) as aside:` fills `aside`, which becomes `folder` only if all went well.

    Raises UserError when `folder` exists already (with `replace` the old one gives way at the end), and when
    the disk is full or cannot be written. Then, as after any other error, nothing new is left behind. What a
    killed process left aside is cleared away first.
    """
    if folder.exists() and not replace:
        raise UserError(f"{folder} exists already: remove it or choose another output folder")
    aside = folder.with_name(f".{folder.name}.incomplete")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = None if isinstance(error, UserError) else why_refused(error)
        if reason is not None:
            raise UserError(f"cannot write {folder}: {reason}; nothing was left there") from error
        raise
