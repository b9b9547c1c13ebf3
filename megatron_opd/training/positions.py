"""Where in the responses things happen: every value of the objective by position, and of single tokens.

Both are sums that travel with those of the metrics, so they cost no collective of their own and are always on.

Relative position is i * 10 // n for token i of a response of n, masked tokens counted. Absolute position is the
bucket [0], [1], [2, 3], [4, 7], ..., that is the number of binary digits of i; the last bucket is open.

Shape suffixes: N loss positions of a microbatch, B bins (first the relative, then the absolute), V values, G gap bins.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RELATIVE_BINS = 10
ABSOLUTE_BUCKETS = 18  # the last begins at 65,536
BINS = RELATIVE_BINS + ABSOLUTE_BUCKETS
GAP_EDGES = (-8.0, -4.0, -2.0, -1.0, -0.5, -0.2, -0.05, 0.05, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)  # nats
GAPS = len(GAP_EDGES) + 1
TRACED_VALUES = ("weight", "student_logprob", "log_gap")
TRACED_TOKENS = 16384  # of an update at most
DIGITS = 7  # significant, of the numbers that are written


@dataclass(frozen=True)
class PositionSums:
    """Sums of the values `names` by position, and counts of log-gaps, in one vector of fixed size."""

    names: tuple[str, ...]

    @property
    def size(self) -> int:
        """The numbers of the vector."""
        return (1 + len(self.names)) * BINS + ("log_gap" in self.names) * ABSOLUTE_BUCKETS * GAPS

    def of(self, values: Mapping[str, Tensor], place_N: Tensor, length_N: Tensor) -> Tensor:
        """The vector [size] of these tokens, float64: [1 + V, B] with the tokens first, then [buckets, G]."""
        values_VN = torch.stack([torch.ones_like(values["loss"]), *(values[name] for name in self.names)])
        absolute_N = place_N.double().frexp().exponent.long().clamp(max=ABSOLUTE_BUCKETS - 1)
        relative_N = place_N * RELATIVE_BINS // length_N.clamp(min=1)
        bins_2N = torch.stack([relative_N, RELATIVE_BINS + absolute_N])
        rows_V = torch.arange(len(values_VN), device=place_N.device) * BINS
        sums = values_VN.new_zeros(self.size)
        index_V2N = rows_V[:, None, None] + bins_2N
        sums.index_add_(0, index_V2N.flatten(), values_VN[:, None].expand(index_V2N.shape).flatten())
        if "log_gap" in self.names:
            gap_N = torch.bucketize(values["log_gap"], values_VN.new_tensor(GAP_EDGES))
            sums.index_add_(0, len(values_VN) * BINS + absolute_N * GAPS + gap_N, values_VN[0])
        return sums

    def row(self, sums: Tensor) -> dict[str, Any]:
        """Tokens and means by position, for people and the report; null where there are none or they are not finite.

        The absolute buckets end with the last that has a token; `first` is the first token of each.
        """
        table = sums[: (1 + len(self.names)) * BINS].view(-1, BINS).tolist()
        used = 1 + max((i for i in range(ABSOLUTE_BUCKETS) if table[0][RELATIVE_BINS + i]), default=-1)
        spans = {"relative": slice(RELATIVE_BINS), "absolute": slice(RELATIVE_BINS, RELATIVE_BINS + used)}
        row: dict[str, Any] = {}
        for name, span in spans.items():
            tokens = table[0][span]
            row[name] = {"tokens": [int(count) for count in tokens]}
            for value, line in zip(self.names, table[1:], strict=True):
                row[name][value] = [_mean(*pair) for pair in zip(line[span], tokens, strict=True)]
        row["absolute"]["first"] = [0, *(2**i for i in range(ABSOLUTE_BUCKETS - 1))][:used]
        if "log_gap" in self.names:
            counts = sums[len(table) * BINS :].view(ABSOLUTE_BUCKETS, GAPS)[:used].long().tolist()
            row["log_gap_counts"] = {"edges": list(GAP_EDGES), "counts": counts}
        return row


def trace_size(traced: int) -> int:
    """The numbers of the trace of so many tokens."""
    return (1 + len(TRACED_VALUES)) * traced


def token_trace(values: Mapping[str, Tensor], number_N: Tensor, traced: int) -> Tensor:
    """[1 + TRACED_VALUES, traced] flattened, float64: of each of the first tokens whether it is here, and its values.

    0 for tokens that are elsewhere, and for values that are not known.
    """
    here_M = (number_N < traced).nonzero()[:, 0]
    loss_N = values["loss"]
    rows = [torch.ones_like(loss_N), *(values.get(name, torch.zeros_like(loss_N)) for name in TRACED_VALUES)]
    trace = loss_N.new_zeros(len(rows), traced)
    trace[:, number_N[here_M]] = torch.stack(rows)[:, here_M]
    return trace.flatten()


def traces_of(
    trace: Tensor, names: Sequence[str], lengths: Sequence[int]
) -> list[dict[str, list[float | None]]]:
    """The trace of an update cut into rollouts of these lengths: of each the TRACED_VALUES among `names`, a token.

    None for a token that is masked or was not traced, and for a number that is not finite.
    """
    here, *rows = trace.view(1 + len(TRACED_VALUES), -1).tolist()
    known = [(name, row) for name, row in zip(TRACED_VALUES, rows, strict=True) if name in names]
    traces, start = [], 0
    for length in lengths:
        tokens = range(start, start + length)
        traces.append(
            {
                name: [_plain(row[i]) if i < len(here) and here[i] else None for i in tokens]
                for name, row in known
            }
        )
        start += length
    return traces


def _mean(total: float, tokens: float) -> float | None:
    return _plain(total / tokens) if tokens else None


def _plain(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
