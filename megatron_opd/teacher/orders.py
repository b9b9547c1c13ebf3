"""What a teacher on ranks of its own is told to do, by the student's first rank.

An order is broadcast in a gloo group of that rank and the teacher's. Giving one does not wait for the teacher, which
may still be at an earlier one.
"""

import pickle
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.config.schema import PayloadKind
from megatron_opd.data.packing import Microbatch
from megatron_opd.objectives.kept_ids import KeptIds


@dataclass(frozen=True)
class Score:
    """Send the student the payloads of these microbatches: the whole ones of all its data-parallel ranks."""

    packed: Sequence[Sequence[Microbatch]]
    kind: PayloadKind | None  # None: what the run's objective reads

    @classmethod
    def of(cls, packed: Sequence[Sequence[Microbatch]], kind: PayloadKind | None) -> "Score":
        """Without what no teacher reads."""
        return cls([[_input_of(microbatch) for microbatch in each] for each in packed], kind)


@dataclass(frozen=True)
class Save:
    """Take part in beginning to write the checkpoint of this step."""

    step: int


@dataclass(frozen=True)
class Publish:
    """Take part in completing the checkpoint that is being written."""


@dataclass(frozen=True)
class Stop:
    """The run is over, or has been stopped (`early`) before its last step."""

    early: bool = False


Order = Score | Save | Publish | Stop


class Orders:
    """Both ends: `give` on rank 0 of `group`, `take` on the others, one `take` an order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._given: deque[tuple[Tensor, Any]] = deque()  # until every rank has it

    def give(self, order: Order) -> None:
        """Tell all others, without waiting for them. Two broadcasts: the size, the pickled order."""
        while self._given and self._given[0][1].is_completed():
            self._finish_oldest()
        content = torch.frombuffer(bytearray(pickle.dumps(order)), dtype=torch.uint8)
        for tensor in (torch.tensor([len(content)]), content):
            handle = dist.broadcast(tensor, group=self._group, group_src=0, async_op=True)
            self._given.append((tensor, handle))

    def finish(self) -> None:
        """Wait until everybody has all orders."""
        while self._given:
            self._finish_oldest()

    def take(self) -> Order:
        """The next order. SystemExit when the one who gives them has ended: it is there that is said why."""
        size = torch.zeros(1, dtype=torch.int64)
        try:
            dist.broadcast(size, group=self._group, group_src=0)
            content = torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(content, group=self._group, group_src=0)
        except RuntimeError:
            raise SystemExit(1) from None
        order: Order = pickle.loads(content.numpy().tobytes())
        return order

    def _finish_oldest(self) -> None:
        self._given.popleft()[1].wait()


def _input_of(microbatch: Microbatch) -> Microbatch:
    """With one number in the place of all that no teacher reads."""
    names = ("rollout_logprobs_T", "drawn_logprobs_T", "place_T", "length_T", "number_T")
    count = len(microbatch.tokens_T)
    zeros = {name: getattr(microbatch, name).new_zeros(1).expand(count) for name in names}
    return replace(microbatch, kept_T=KeptIds.of(), **zeros)
