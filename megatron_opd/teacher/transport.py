"""Teacher payloads from the ranks that make them to those that read them, where the two models' layouts differ.

Every student rank packs all rollouts alike, so the whole microbatches of all ranks are known everywhere, with their
loss positions: who sends which rows to whom, and how many, follows on both sides from `Layouts.routes`. Messages have
no headers and pass through no third rank. The teacher's last stage holds the rows of whole microbatches (of its own
context-parallel share of them), every tensor-parallel rank the same; a student rank needs those of its zigzag share.

Whole microbatches are numbered index by index, within an index by the student's data-parallel rank: in this order the
student uses them, and the teacher makes and sends them. Shapes: N rows of a payload, one a loss position; M rows that
one message carries.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.data.packing import Microbatch, pack
from megatron_opd.objectives import zigzag_positions
from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.teacher.payload import PayloadFormat, TeacherPayload, tensors_of


@dataclass(frozen=True)
class Route:
    """One message: rows of a microbatch's payload from one rank to another, maybe the same."""

    number: int  # of the whole microbatch
    sender: int
    receiver: int
    taken_M: Tensor  # rows of the sender's payload, ascending
    placed_M: Tensor  # the same rows in the receiver's, ascending


@dataclass(frozen=True)
class Layouts:
    """Student and teacher. The student's ranks begin at 0, the teacher's at `first`: 0, or after the student's."""

    student: ParallelLayout
    teacher: ParallelLayout
    first: int

    def __str__(self) -> str:
        last = self.first + self.teacher.world_size - 1
        own = f"process {last}" if last == self.first else f"processes {self.first} to {last}"
        return f"{self.teacher} on {own if self.first else 'the same processes'}"

    def dealt(self, whole: Sequence[Microbatch]) -> list[list[int]]:
        """Numbers of the microbatches that each replica of the teacher forwards, in order.

        Those without a loss position are nobody's.
        """
        scored = [number for number, microbatch in enumerate(whole) if microbatch.mask_T.any()]
        replicas = self.teacher.data
        return [scored[replica::replicas] for replica in range(replicas)]

    def work(self, whole: Sequence[Microbatch], replica: int) -> list[tuple[int | None, Microbatch]]:
        """(number, microbatch) of what one of the teacher's replicas forwards.

        All replicas have equally many, in the groups that an interleaved pipeline takes: None numbers what is added.
        """
        numbers, multiple = self.dealt(whole), self.teacher.microbatch_multiple
        count = -(-max(map(len, numbers)) // multiple) * multiple
        alignment = self.teacher.segment_alignment
        ((nothing,),) = pack([], dp_size=1, token_budget=alignment, alignment=alignment)
        mine = [(number, whole[number]) for number in numbers[replica]]
        return [*mine, *[(None, nothing)] * (count - len(mine))]

    def routes(self, whole: Sequence[Microbatch]) -> list[Route]:
        """Every message about these microbatches, by number.

        A rank that holds what it needs keeps it; the other receivers are spread over the ranks that hold it.
        """
        replica_of = {n: replica for replica, numbers in enumerate(self.dealt(whole)) for n in numbers}
        return [
            Route(number, _sender(receiver, turn, holders), receiver, taken_M, placed_M)
            for number, replica in sorted(replica_of.items())
            for receivers in [self._receivers(whole[number], number)]
            for held_N, holders in self._holders(whole[number], replica)
            for turn, (needed_N, receiver) in enumerate(receivers)
            for taken_M, placed_M in [_common_rows(held_N, needed_N)]
            if len(taken_M)
        ]

    def _holders(self, microbatch: Microbatch, replica: int) -> list[tuple[Tensor, list[int]]]:
        """Of each part of a microbatch's payload its rows, and the ranks that hold them."""
        layout = self.teacher
        last = {"data": replica, "pipeline": layout.pipeline - 1}
        return [
            (
                rows_of_share(microbatch, context, layout.context),
                [self.first + layout.rank(tensor=t, context=context, **last) for t in range(layout.tensor)],
            )
            for context in range(layout.context)
        ]

    def _receivers(self, microbatch: Microbatch, number: int) -> list[tuple[Tensor, int]]:
        """(rows that it needs, rank) of each rank that reads a microbatch's payload."""
        layout = self.student
        last = {"data": number % layout.data, "pipeline": layout.pipeline - 1}
        shares = [rows_of_share(microbatch, context, layout.context) for context in range(layout.context)]
        return [
            (needed_N, layout.rank(tensor=tensor, context=context, **last))
            for context, needed_N in enumerate(shares)
            for tensor in range(layout.tensor)
        ]


def by_number(routes: Iterable[Route]) -> dict[int, list[Route]]:
    """The routes of each microbatch."""
    found: dict[int, list[Route]] = {}
    for route in routes:
        found.setdefault(route.number, []).append(route)
    return found


def in_order(packed: Sequence[Sequence[Microbatch]]) -> list[Microbatch]:
    """The whole microbatches of all data-parallel ranks, by number."""
    return list(chain.from_iterable(zip(*packed, strict=True)))


def rows_of_share(microbatch: Microbatch, rank: int, ranks: int) -> Tensor:
    """Which rows of a whole microbatch's payload a context-parallel rank's share of it has, ascending: [N] int64."""
    positions = zigzag_positions(microbatch.cu_seqlens, rank, ranks)
    rows_T = microbatch.mask_T.long().cumsum(0) - 1
    return rows_T[positions][microbatch.mask_T[positions]]


def _common_rows(held_N: Tensor, needed_N: Tensor) -> tuple[Tensor, Tensor]:
    """Where the rows that are in both lie in the one and in the other."""
    return torch.isin(held_N, needed_N).nonzero()[:, 0], torch.isin(needed_N, held_N).nonzero()[:, 0]


def _sender(receiver: int, turn: int, holders: Sequence[int]) -> int:
    return receiver if receiver in holders else holders[turn % len(holders)]


class Arrival:
    """A payload of `rows` loss positions on its way to this rank; the messages of `routes` fill it."""

    def __init__(
        self,
        routes: Sequence[Route],
        rows: int,
        form: PayloadFormat,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._form, self._group = form, group
        self._tensors = [
            torch.empty(rows, *trailing, dtype=dtype, device=device) for trailing, dtype in form.tensors
        ]
        self._rooms = [(route, [_room(tensor, route) for tensor in self._tensors]) for route in routes]

    def operations(self) -> list[dist.P2POp]:
        """The receives, in the order in which their messages are sent. The payload is there when they are done."""
        return [
            dist.P2POp(dist.irecv, room, route.sender, self._group)
            for route, rooms in self._rooms
            for room in rooms
            if route.sender != dist.get_rank()
        ]

    def keep(self, payload: TeacherPayload) -> None:
        """Take what this rank itself holds: the rows of its own payload."""
        for route, rooms in self._rooms:
            if route.sender == dist.get_rank():
                for room, rows in zip(rooms, _taken(payload, route, self._form), strict=True):
                    room.copy_(rows)

    def payload(self) -> TeacherPayload:
        """The payload, once everything has arrived."""
        for route, rooms in self._rooms:
            for tensor, room in zip(self._tensors, rooms, strict=True):
                if room is not tensor:
                    tensor[route.placed_M.to(tensor.device)] = room
        return self._form.payload(self._tensors)


def messages(
    payload: TeacherPayload, routes: Sequence[Route], form: PayloadFormat, group: dist.ProcessGroup
) -> list[dist.P2POp]:
    """The sends of a payload that this rank holds, one a route that leads away and tensor."""
    return [
        dist.P2POp(dist.isend, rows, route.receiver, group)
        for route in routes
        if route.receiver != route.sender
        for rows in _taken(payload, route, form)
    ]


def start(operations: list[dist.P2POp]) -> list[Any]:
    """Start sends and receives; the handles to wait on. Two ranks start those between them in the same order."""
    return dist.batch_isend_irecv(operations) if operations else []


def _room(tensor: Tensor, route: Route) -> Tensor:
    """Where a message is received: in the payload itself if it is all of it."""
    count = len(route.placed_M)
    return tensor if count == len(tensor) else tensor.new_empty(count, *tensor.shape[1:])


def _taken(payload: TeacherPayload, route: Route, form: PayloadFormat) -> list[Tensor]:
    """The rows of a route's message, as the format has them."""
    return [
        (tensor if len(route.taken_M) == len(tensor) else tensor[route.taken_M.to(tensor.device)])
        .to(dtype)
        .contiguous()
        for tensor, (_, dtype) in zip(tensors_of(payload), form.tensors, strict=True)
    ]
