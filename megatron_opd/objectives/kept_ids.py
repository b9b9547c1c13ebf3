"""The ids that a top-p or top-k cut left to draw from: any number a token, so they lie end to end.

Shape suffixes: N tokens, E ids of all tokens together, C tokens of a chunk, V columns of a shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeptIds:
    """The ids of each of N tokens, distinct and in any order; a token may have none. 4 bytes an id.

    Those of token n are ids_E[offsets_N1[n] : offsets_N1[n + 1]].
    """

    ids_E: Tensor  # int32, on any device
    offsets_N1: Tensor  # int64, on the CPU: they say how much is read

    @classmethod
    def of(cls, ids_of_tokens: Iterable[Sequence[int] | Tensor] = ()) -> KeptIds:
        """From the ids of every token."""
        rows = [torch.as_tensor(ids, dtype=torch.int32) for ids in ids_of_tokens]
        counts_N = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        return cls.counted(torch.cat(rows) if rows else counts_N.int(), counts_N)

    @classmethod
    def counted(cls, ids_E: Tensor, counts_N: Tensor) -> KeptIds:
        """From the ids end to end, and how many of them are each token's."""
        return cls(ids_E.int(), torch.nn.functional.pad(counts_N.cpu().long().cumsum(0), (1, 0)))

    @classmethod
    def joined(cls, parts: Sequence[KeptIds]) -> KeptIds:
        """The tokens of all parts, one part after the other."""
        if not parts:
            return cls.of()
        return cls.counted(
            torch.cat([part.ids_E for part in parts]), torch.cat([part.counts_N for part in parts])
        )

    @property
    def counts_N(self) -> Tensor:
        """How many ids each token has, int64 on the CPU."""
        return self.offsets_N1.diff()

    def __len__(self) -> int:
        return len(self.offsets_N1) - 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KeptIds):
            return NotImplemented
        return torch.equal(self.offsets_N1, other.offsets_N1) and torch.equal(self.ids_E, other.ids_E)

    def lists(self) -> list[list[int]]:
        """The ids of every token."""
        return [row.tolist() for row in self.ids_E.split(self.counts_N.tolist())]

    def at(self, tokens: Tensor) -> KeptIds:
        """Those of some of the tokens, by their indices, in that order."""
        tokens = tokens.cpu()
        counts = self.counts_N[tokens]
        shift = self.offsets_N1[:-1][tokens] - (counts.cumsum(0) - counts)
        index = torch.arange(int(counts.sum())) + shift.repeat_interleave(counts)
        return KeptIds.counted(self.ids_E[index.to(self.ids_E.device)], counts)

    def hold(self, ids_N: Tensor) -> Tensor:
        """Whether the ids of each token contain the one of ids_N, bool [N] on the CPU."""
        same_E = self.ids_E.cpu() == ids_N.cpu().repeat_interleave(self.counts_N)
        found = torch.nn.functional.pad(same_E.long().cumsum(0), (1, 0))
        return found[self.offsets_N1].diff() > 0

    def to(self, device: torch.device) -> KeptIds:
        """The same with the ids on another device."""
        return KeptIds(self.ids_E.to(device), self.offsets_N1)

    def left_out(self, tokens: slice, *, first: int, columns: int) -> Tensor:
        """[C, V] bool of these tokens on the ids' device: which of the ids first ... first + columns - 1 were cut."""
        start, stop = self.offsets_N1[tokens.start], self.offsets_N1[tokens.stop]
        counts_C = self.offsets_N1[tokens.start : tokens.stop + 1].diff()
        ids_E = self.ids_E[start:stop]
        rows_E = torch.arange(len(counts_C)).repeat_interleave(counts_C).to(ids_E.device)
        columns_E = ids_E.long() - first
        # One column more takes the ids of other shards.
        columns_E = columns_E.where((columns_E >= 0) & (columns_E < columns), columns)
        left_out = torch.ones(len(counts_C), columns + 1, dtype=torch.bool, device=ids_E.device)
        left_out[rows_E, columns_E] = False
        return left_out[:, :columns]
