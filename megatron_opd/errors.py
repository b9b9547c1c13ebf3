"""The exception type for mistakes the user can mend, that for outages, and why a disk refused a write.

Raise `UserError` for bad input (a misspelt key, a missing folder, a full disk). The command line prints it as one
line, without a traceback, and exits with code 2; so it does with an `Outage`, but with code 1, after which a scheduler
may start the run again. Anything else that escapes is a bug of ours and keeps its traceback.
"""

import errno
from pathlib import Path

_REFUSED = {
    errno.ENOSPC: "no space left on device",
    errno.EDQUOT: "disk quota exceeded",
    errno.EACCES: "permission denied",
    errno.EROFS: "read-only file system",
    errno.ENOTDIR: "a parent of it is a file",
    errno.EPERM: "operation not permitted",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "too many symbolic links",
}
WRITER_KILLED = "a process that writes it was killed, as it is when memory runs out"
"""Of the reasons of `why_refused` the one that is an Outage."""
_REFUSED_IN_WORDS = {
    "No space left on device": "no space left on device",
    "Disk quota exceeded": "disk quota exceeded",
    "unexpected pos": "a write was cut short, as on a full disk",  # torch's zip writer says nothing else
    "a writer was killed": WRITER_KILLED,
}


class UserError(Exception):
    """Bad input. The message is one line that names the key or file and says what to do about it."""

    exit_code = 2


class Outage(UserError):
    """What the run depends on failed, and may work at the next start: servers, a process that was killed."""

    exit_code = 1


def check_readable(path: Path) -> None:
    """Raise UserError for a file that the system does not open; libraries call such a file damaged."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"cannot read {path}: {why_refused(error) or error.strerror}") from None


def why_refused(error: BaseException | None) -> str | None:
    """Why the system refused a write, None if that is not what went wrong.

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
