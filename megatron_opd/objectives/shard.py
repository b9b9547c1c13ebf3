"""What is compared, and which part of the vocabulary this rank holds.

Shape suffixes: N tokens, D hidden size, V columns of a shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from megatron_opd.objectives.kept_ids import KeptIds
from megatron_opd.objectives.logits import LinearLogits

DIVERGENCE_KINDS = ("reverse_kl", "forward_kl", "jsd")


@dataclass(frozen=True)
class Request:
    """What to compute, the same on every rank."""

    kind: str = "logprob"  # one of DIVERGENCE_KINDS, or "logprob": no divergence is wanted
    beta: float = 0.5  # of jsd
    temperature: float = 1.0
    vocab_size: int | None = None
    group: dist.ProcessGroup | None = None
    entropies: bool = False
    check: bool = False
    inplace_backward: bool = False
    chunk_size: int | None = None
    sequence_parallel: bool = False
    best_of: str | None = None  # "teacher" or "student": also find the k ids that it likes best
    k: int = 0
    kept: KeptIds | None = None  # both models are restricted to these ids; None: to none

    def __post_init__(self) -> None:
        if not self.temperature > 0.0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")
        if self.kind == "jsd" and not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta must lie between 0 and 1, both excluded (forward_kl and reverse_kl are there), not {self.beta}"
            )
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {self.chunk_size}")


class Shard(NamedTuple):
    """The part of the real vocabulary that this rank holds."""

    start: int  # global id of the first column
    columns: int  # how many of the columns are real
    ranks: int
    vocab_size: int
    tokens: int  # N

    @classmethod
    def of(
        cls,
        student: Tensor | LinearLogits,
        teacher: Tensor | LinearLogits | None,
        targets_N: Tensor | None,
        request: Request,
    ) -> Shard:
        """This rank's part. ValueError for shapes or a vocab_size that do not agree."""
        group = request.group
        rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        count, width = _shape("student", student, ranks if request.sequence_parallel else 1)
        if teacher is not None:
            others = _shape("teacher", teacher, 1)
            # One rank holds every id, so paddings of different length do no harm once vocab_size is known.
            padded = ranks == 1 and request.vocab_size is not None and others[0] == count
            if others != (count, width) and not padded:
                raise ValueError(
                    f"student and teacher logits must be [N, V/TP] shards of the same ids, not {(count, width)} "
                    f"and {others}"
                )
            width = min(width, others[1])
        if targets_N is not None and tuple(targets_N.shape) != (count,):
            raise ValueError(f"targets must have shape {(count,)}, not {tuple(targets_N.shape)}")
        if request.kept is not None and len(request.kept) != count:
            raise ValueError(f"kept has the ids of {len(request.kept)} tokens, not of {count}")
        vocab_size = width * ranks if request.vocab_size is None else request.vocab_size
        if not 0 < vocab_size <= width * ranks:
            raise ValueError(
                f"vocab_size must be between 1 and {width * ranks} (width of all shards), not {vocab_size}"
            )
        start = rank * width
        return cls(start, min(max(vocab_size - start, 0), width), ranks, vocab_size, count)

    def left_out(self, kept: KeptIds | None) -> Callable[[slice], Tensor] | None:
        """What `LogitsPair` asks of a slice of tokens: which columns of this shard are not among the kept ids."""
        return None if kept is None else partial(kept.left_out, first=self.start, columns=self.columns)

    def columns_of(self, ids: Tensor) -> Tensor:
        """Column of each global id in this shard, -1 where it is not a real id of this shard."""
        columns = ids - self.start
        return columns.where((columns >= 0) & (columns < self.columns), -1)


def _shape(name: str, logits: Tensor | LinearLogits, sequence_shards: int) -> tuple[int, int]:
    """(N, V/TP) of logits, whichever way they are given."""
    if isinstance(logits, LinearLogits):
        hidden, weight = tuple(logits.hidden.shape), tuple(logits.weight.shape)
        if len(hidden) != 2 or len(weight) != 2 or hidden[1] != weight[1]:
            raise ValueError(
                f"{name} hidden states and head must be [N, D] and [V/TP, D], not {hidden} and {weight}"
            )
        return hidden[0] * sequence_shards, weight[0]
    if logits.dim() != 2:
        raise ValueError(f"{name} logits must be [N, V/TP] shards of the same ids, not {tuple(logits.shape)}")
    return logits.shape[0], logits.shape[1]
