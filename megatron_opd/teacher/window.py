"""Payloads of a teacher on ranks of its own, in bounded windows: it scores on while the student learns.

A sender has at most `window` payloads under way, and makes no further one before the oldest has arrived; a receiver has
room for `window` payloads beyond the one that it is using. So both hold `window` payloads of N rows, not a step's.

Why nobody waits for ever: the student's ranks use payloads in the order of their numbers (index by index, the orders
one after the other), and the teacher's replicas make and send theirs in this order. Let n, of index i, be the first
number that a rank has not used while it waits. All ranks have used every index below i, so the room for index i, at
least, is there on each of them: whatever has a number up to n can arrive, with no help from the receiver. A replica
that waits in `Outbox.send` thus waits for a later number, and has forwarded all its earlier ones. So the replica that
owes n is not waiting there; nor, before it has taken part, is any replica that it meets in a collective of that forward
pass (experts are exchanged between replicas, the k-th microbatch of each together): n is sent. On the other side, what
the waiting rank owes others in collectives before it uses n it has done, and what comes later they cannot need before
they too have used index i: the student's replicas run the same microbatches in the same order. Orders, too, are given
without waiting for the teacher (`orders`).
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_opd.teacher.payload import Awaited, PayloadFormat, TeacherPayload
from megatron_opd.teacher.transport import Arrival, Route, messages, start

WINDOW = 2


class Outbox:
    """Sends payloads from this rank, at most `window` of them at a time."""

    def __init__(self, group: dist.ProcessGroup, window: int = WINDOW) -> None:
        self._group, self._window = group, window
        self._under_way: deque[tuple[list[dist.P2POp], list[Any]]] = deque()

    def send(self, payload: TeacherPayload, routes: Sequence[Route], form: PayloadFormat) -> None:
        """Start to send the rows of `routes`, once fewer than `window` payloads are under way."""
        if not routes:
            return
        while len(self._under_way) >= self._window:
            self._finish_oldest()
        operations = messages(payload, routes, form, self._group)
        self._under_way.append((operations, start(operations)))

    def flush(self) -> None:
        """Wait until everything has arrived."""
        while self._under_way:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        operations, handles = self._under_way.popleft()
        for handle in handles:
            handle.wait()
        if operations[0].tensor.is_cuda:  # there `wait` only orders streams
            torch.cuda.current_stream().synchronize()


@dataclass(frozen=True)
class _Expected:
    ticket: int
    routes: Sequence[Route]
    rows: int
    form: PayloadFormat


class Inbox:
    """Receives this rank's payloads in the order in which they are expected, with room for `window` at a time.

    `waited`: seconds for which the process has waited for them. On a GPU it is a stream that waits, which is not seen.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, window: int = WINDOW) -> None:
        self._group, self._device, self._window = group, device, window
        self._tickets = 0
        self._expected: deque[_Expected] = deque()
        self._arriving: deque[tuple[int, Arrival, list[Any]]] = deque()
        self.waited = 0.0

    def expect(self, routes: Sequence[Route], rows: int, form: PayloadFormat) -> Awaited:
        """A payload of `rows` rows, brought by `routes`, that comes after all those expected before.

        They are waited for in the same order.
        """
        ticket = self._tickets
        self._tickets += 1
        self._expected.append(_Expected(ticket, routes, rows, form))
        self._make_room()
        return Awaited(lambda: self._take(ticket))

    def _take(self, ticket: int) -> TeacherPayload:
        oldest, arrival, handles = self._arriving.popleft()
        assert oldest == ticket, "payloads are used in the order in which they were expected"
        began = time.perf_counter()
        for handle in handles:
            handle.wait()
        self.waited += time.perf_counter() - began
        self._make_room()
        return arrival.payload()

    def _make_room(self) -> None:
        while self._expected and len(self._arriving) < self._window:
            due = self._expected.popleft()
            arrival = Arrival(due.routes, due.rows, due.form, self._group, self._device)
            self._arriving.append((due.ticket, arrival, start(arrival.operations())))
