"""How a new folder comes into being: written aside, then renamed, so that it is complete or not there."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_opd.errors import UserError

_REFUSED = {
    errno.ENOSPC: "no space left on device",
    errno.EDQUOT: "disk quota exceeded",
    errno.EACCES: "permission denied",
    errno.EROFS: "read-only file system",
    errno.ENOTDIR: "a parent of it is a file",
}
_REFUSED_IN_WORDS = {
    "No space left on device": "no space left on device",
    "Disk quota exceeded": "disk quota exceeded",
    "unexpected pos": "a write was cut short, as on a full disk",  # torch's zip writer says nothing else
}


def why_refused(error: BaseException | None) -> str | None:
    """Why the file system refused a write, None if that is not what went wrong.

    Writers in other processes or other languages only leave the system's text in their message.
    """
    if error is None:
        return None
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return _REFUSED[error.errno]
    for text, reason in _REFUSED_IN_WORDS.items():
        if text in str(error):
            return reason
    return why_refused(error.__cause__ or error.__context__)


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
