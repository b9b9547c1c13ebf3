"""How a new folder comes into being: written aside, then renamed, so that it is complete or not there.

Several processes can write one folder together; what goes wrong on one of them is raised on all.
"""

import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from megatron_opd.errors import UserError, why_refused
from megatron_opd.launch.worker import EXIT_FILE

LOCK_PATIENCE = 300.0  # seconds that a shared file system may take to release what a lost node has locked
LOCK_POLL = 1.0  # seconds

# What megatron-core's writer logs as an error also reaches us as an exception, and the user as one line.
logging.getLogger("megatron.core.dist_checkpointing.strategies.filesystem_async").setLevel(logging.CRITICAL)


def hold(folder: Path) -> None:
    """Keep a folder to this process until it ends. Raises UserError when another process holds it.

    In a job of `launch slurm` only after LOCK_PATIENCE: nobody stands by, and the job before has ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(
        folder / ".lock", os.O_CREAT | os.O_RDWR
    )  # stays open, and so locked, as long as the process
    deadline = time.monotonic() + LOCK_PATIENCE if EXIT_FILE in os.environ else None
    if deadline is not None and not _locked(lock):
        print(f"{folder} is in use by another process: waiting {LOCK_PATIENCE:.0f} s for it", flush=True)
    while not _locked(lock):
        if deadline is None or time.monotonic() > deadline:
            os.close(lock)
            raise UserError(f"{folder} is in use by another process: wait for it, or give another run_dir")
        time.sleep(LOCK_POLL)


def _locked(lock: int) -> bool:
    """Whether this open file now has the lock; it may have had it before."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def aside_of(folder: Path) -> Path:
    """Where a folder is while it is being written. Raises UserError for one that cannot be written at all."""
    folder = Path(os.path.abspath(folder))
    if not folder.name:
        raise UserError(f"{folder} cannot be an output folder: give a new one")
    return folder.with_name(f".{folder.name}.incomplete")


def _lock_of(aside: Path) -> Path:
    return aside.with_suffix(".lock")


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing `folder` meanwhile. Raises UserError when one does."""
    path = _lock_of(aside_of(folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing {folder}: wait for it, or give another folder"
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def written_aside(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """`with written_aside(folder) as aside:` fills `aside`, which becomes `folder` only if all went well.

    Raises UserError when `folder` exists already (with `replace` the old one gives way at the end), and when
    the disk is full or cannot be written. Then, as after any other error, nothing new is left behind. What a
    killed process left aside is cleared away first.
    """
    if not replace:
        _check_absent(folder)
    aside = aside_of(folder)
    with _refusals_named(folder), _only_writer(folder):
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            yield aside
            if folder.exists():
                shutil.rmtree(folder)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _refusals_named(folder: Path) -> Iterator[None]:
    """What the file system refuses inside becomes a UserError naming it: `folder`, or a file that was to be read."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        reason = why_refused(error)
        if reason is None:
            raise
        source = _unreadable(error, aside_of(folder))
        if source is not None:
            raise UserError(f"cannot read {source}: {reason}") from error
        raise UserError(f"cannot write {folder}: {reason}; nothing was left there") from error


def _unreadable(error: BaseException, aside: Path) -> Path | None:
    """The file that the system names as refused, unless it is part of what is being written to `aside`."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of copies the system names both files
    if not isinstance(error, OSError) or error.errno in full or not isinstance(error.filename, str | Path):
        return None
    path = Path(os.path.abspath(error.filename))
    written = path.is_relative_to(aside) or aside.is_relative_to(path) or path == _lock_of(aside)
    return None if written else path


@contextmanager
def tidied(folder: Path) -> Iterator[None]:
    """What started processes, killed perhaps, leave half-written of `folder` is removed at the end.

    Not what another process is writing there.
    """
    try:
        yield
    finally:
        with suppress(UserError, OSError), _only_writer(folder):
            shutil.rmtree(aside_of(folder), ignore_errors=True)


@contextmanager
def written_together(folder: Path, group: dist.ProcessGroup | None, needed_bytes: int) -> Iterator[Path]:
    """`written_aside` for the processes of a group: all of them fill `aside`, rank 0 makes and publishes it.

    Raises UserError also when the disk has less than `needed_bytes` left. `group` None: this process alone.
    Collective over `group`: 3 object all-gathers; `aside` is there on every rank, and published when it returns.
    """
    aside = aside_of(folder)
    publishing = ExitStack()
    with alike(group):
        if group is None or group.rank() == 0:
            check_new_folder(folder, needed_bytes)
            publishing.enter_context(written_aside(folder))
    with alike(group), publishing, alike(group), _refusals_named(folder):
        yield aside


@contextmanager
def alike(group: dist.ProcessGroup | None) -> Iterator[None]:
    """What goes wrong inside on one rank is raised on every rank of the group. Collective: 1 object all-gather.

    `group` None: this process alone. A UserError stays what it is, anything else is a RuntimeError elsewhere.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as failure:
        error = failure
    if group is not None:
        kind = type(error) if isinstance(error, UserError) else None
        mine = None if error is None else (kind, str(error) or repr(error))
        everyone: list[tuple[type[UserError] | None, str] | None] = [None] * group.size()
        dist.all_gather_object(everyone, mine, group=group)
        mistake = next((found[0](found[1]) for found in everyone if found and found[0]), None)
        if mistake is not None and kind is None:
            raise mistake from error
        other = next((found[1] for found in everyone if found), None)
        if other is not None and error is None:
            raise RuntimeError(f"another process failed: {other}")
    if error is not None:
        raise error


def check_new_folder(folder: Path, needed_bytes: int) -> None:
    """Raise UserError for a folder that cannot be made: it exists, may not be written, or has no room for the bytes."""
    _check_absent(folder)
    existing = next(path for path in aside_of(folder).parents if path.exists())
    if not existing.is_dir():
        raise UserError(f"cannot write {folder}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
        raise UserError(
            f"cannot write {folder}: {'read-only file system' if read_only else 'permission denied'}"
        )
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        sizes = f"{needed_bytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        raise UserError(f"cannot write {folder}: no space left on device ({sizes}); nothing was left there")


def _check_absent(folder: Path) -> None:
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists already: remove it or choose another output folder")
