"""positions.jsonl: what a step says of the places in its responses, one object a step; read for the report.

    {"step": 3,
     "relative": {"tokens": [...], "reverse_kl": [...], "weight": [...], ...},      tenths of the response
     "absolute": {"first": [0, 1, 2, 4, ...], "tokens": [...], "reverse_kl": [...], ...},    doubling buckets
     "log_gap_counts": {"edges": [...], "counts": [[...], ...]}}                   tokens, a list a doubling bucket

Every other list is the mean of a value over the tokens there (the names are those of metrics.jsonl), null where there
are none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POSITIONS_FILE = Path("positions.jsonl")


@dataclass(frozen=True)
class Diagnostics:
    """What a step leaves for the report beside its metrics."""

    positions: Mapping[str, Any] | None = None  # the row of positions.jsonl; None: no token entered the loss
    traces: Sequence[Mapping[str, Sequence[float | None]]] = ()  # of its first rollouts, a number a token
