"""Megatron teachers in a layout of their own: what the student's ranks have of them.

Payloads come to the student's last stage through `transport`. There the rows of the teacher's LM head for the same
token ids as the student's shard lie beside it: hidden states are projected where they are used, whatever layout and
vocabulary padding the teacher has. Shapes: N loss positions, D the teacher's hidden size, W rows of a head shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_opd.data.packing import Microbatch
from megatron_opd.objectives import LinearLogits, ServedLogprobs
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.teacher.payload import PayloadFormat, TeacherPayload
from megatron_opd.teacher.projection import distribution
from megatron_opd.teacher.teacher import Asked, Teacher
from megatron_opd.teacher.transport import (
    Arrival,
    Layouts,
    by_number,
    in_order,
    messages,
    rows_of_share,
    start,
)


@dataclass(frozen=True)
class Reader:
    """What a student rank needs to read payloads of `form`, and of its other kinds.

    `head_WD` is the teacher's head for the ids of this rank's shard of W rows, None where nothing reads hidden states.
    """

    groups: ProcessGroupCollection  # the student's
    form: PayloadFormat
    head_WD: Tensor | None
    width: int  # W
    device: torch.device

    @property
    def last_stage(self) -> bool:
        """Whether this rank is on the student's last pipeline stage, where payloads are read."""
        return bool(self.groups.pp.rank() == self.groups.pp.size() - 1)

    def rows(self, whole: Sequence[Microbatch]) -> list[tuple[int, int]]:
        """(number, rows of its payload) of the microbatches that this rank reads."""
        dp, cp = self.groups.dp, self.groups.cp
        numbers = range(dp.rank(), len(whole), dp.size())
        return [(number, len(rows_of_share(whole[number], cp.rank(), cp.size()))) for number in numbers]

    def distribution(
        self, payload: TeacherPayload, *, chunked: bool
    ) -> Tensor | LinearLogits | ServedLogprobs:
        """What the objective reads of a payload, see `projection.distribution`. Last stage only, no collectives."""
        return distribution(payload, self.head_WD, self.width, self.groups.tp, chunked=chunked)


class RelaidTeacher(Teacher):
    """A teacher on the student's ranks, `model` in its own layout. `group` is for its messages alone."""

    def __init__(
        self, model: MegatronTeacher, layouts: Layouts, reader: Reader, group: dist.ProcessGroup
    ) -> None:
        self.model, self.layouts, self._reader, self._group = model, layouts, reader, group

    def score(self, asked: Asked) -> list[TeacherPayload | None]:
        """One payload a microbatch of this rank's on the student's last stage, None on its others.

        After the forward pass all messages are sent at once: 1 for each route and tensor. Memory kept: until then the
        payloads of the teacher's replica, afterwards this rank's.
        """
        whole, form = in_order(asked.whole), self._reader.form.of_kind(asked.kind)
        groups = self.model.groups
        work = self.layouts.work(whole, groups.dp.rank())
        shares = [each.shard(groups.cp.rank(), groups.cp.size()).to(self._reader.device) for _, each in work]
        payloads = self.model.hand_over(shares, lambda payload: payload, asked.kind)
        held = dict(zip((number for number, _ in work), payloads, strict=True))
        routes, me = self.layouts.routes(whole), dist.get_rank()
        incoming = by_number(route for route in routes if route.receiver == me)
        outgoing = by_number(route for route in routes if route.sender == me)
        arrivals = {
            number: Arrival(incoming.get(number, []), rows, form, self._group, self._reader.device)
            for number, rows in (self._reader.rows(whole) if self._reader.last_stage else [])
        }
        operations = [operation for arrival in arrivals.values() for operation in arrival.operations()]
        for number, leaving in outgoing.items():
            payload = held[number]
            assert payload is not None
            operations += messages(payload, leaving, form, self._group)
            if number in arrivals:
                arrivals[number].keep(payload)
        for handle in start(operations):
            handle.wait()
        if not self._reader.last_stage:
            return [None] * len(asked.microbatches)
        return [arrival.payload() for arrival in arrivals.values()]

    def distribution(
        self, payload: TeacherPayload, *, chunked: bool
    ) -> Tensor | LinearLogits | ServedLogprobs:
        """What the objective reads of a payload, see `Reader.distribution`."""
        return self._reader.distribution(payload, chunked=chunked)

    def described(self) -> str:
        """Both layouts."""
        return str(self.layouts)
