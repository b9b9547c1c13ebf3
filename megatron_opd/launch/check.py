"""`Check`, one line of what `megatron-opd doctor` reports."""

from dataclasses import dataclass

OK, NOTE, MISSING = "ok", "note", "missing"
GIB = 1024**3


@dataclass(frozen=True)
class Check:
    """One line of the report. `state` is OK, NOTE (training works without it) or MISSING (it does not)."""

    name: str
    found: str
    state: str = OK
    remedy: str = ""
