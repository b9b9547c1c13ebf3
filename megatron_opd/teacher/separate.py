"""A Megatron teacher on ranks of its own: what the student's ranks have of it, and what its own ranks do."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.objectives import LinearLogits, ServedLogprobs
from megatron_opd.parallel.groups import all_ranks
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.teacher.orders import Orders, Publish, Save, Score, Stop
from megatron_opd.teacher.payload import Awaited, TeacherPayload
from megatron_opd.teacher.relaid import Reader
from megatron_opd.teacher.teacher import Asked, Teacher
from megatron_opd.teacher.transport import Layouts, by_number, in_order
from megatron_opd.teacher.window import WINDOW, Inbox, Outbox
from megatron_opd.watch.phases import ORDERS, SAVE, TEACHER, Phases


class SeparateTeacher(Teacher):
    """The teacher as a student rank sees it. `group` is for payloads alone; `orders` is None but on rank 0."""

    def __init__(
        self,
        layouts: Layouts,
        reader: Reader,
        group: dist.ProcessGroup,
        orders: Orders | None,
        *,
        window: int = WINDOW,
    ) -> None:
        self.layouts, self._reader, self._orders = layouts, reader, orders
        self._inbox = Inbox(group, reader.device, window)

    def score(self, asked: Asked) -> list[TeacherPayload | None]:
        """One payload a microbatch of this rank's on the student's last stage, None on its others. Returns at once.

        The payloads are read, by `distribution`, in the order in which they were asked for, and each once.
        """
        self._inbox.waited = 0.0
        if self._orders is not None:
            self._orders.give(Score.of(asked.whole, asked.kind))
        if not self._reader.last_stage:
            return [None] * len(asked.microbatches)
        whole, me, form = in_order(asked.whole), dist.get_rank(), self._reader.form.of_kind(asked.kind)
        incoming = by_number(route for route in self.layouts.routes(whole) if route.receiver == me)
        return [
            self._inbox.expect(incoming.get(number, []), rows, form)
            for number, rows in self._reader.rows(whole)
        ]

    def distribution(
        self, payload: TeacherPayload, *, chunked: bool
    ) -> Tensor | LinearLogits | ServedLogprobs:
        """What the objective reads of a payload, once it has arrived, see `Reader.distribution`."""
        there = payload.wait() if isinstance(payload, Awaited) else payload
        return self._reader.distribution(there, chunked=chunked)

    def described(self) -> str:
        """Both layouts."""
        return str(self.layouts)

    def metrics(self) -> dict[str, float]:
        """Seconds of waiting for the payloads last asked for, on the student's rank that has waited longest.

        Every rank of the student calls it, after it has read them: 1 all-reduce. Nothing on a GPU, see `Inbox.waited`.
        """
        if self._reader.device.type == "cuda":
            return {}
        waited = torch.tensor(self._inbox.waited, dtype=torch.float64)
        self._inbox.waited = 0.0
        dist.all_reduce(waited, dist.ReduceOp.MAX, group=all_ranks(self._reader.groups))
        return {"teacher_wait_seconds": waited.item()}

    def before_save(self, step: int) -> None:
        """Have the teacher's ranks take part in saving `step`."""
        if self._orders is not None:
            self._orders.give(Save(step))

    def before_publish(self) -> None:
        if self._orders is not None:
            self._orders.give(Publish())

    def finish(self, *, early: bool = False) -> None:
        """Let the teacher's ranks end, once they have done everything else."""
        if self._orders is not None:
            self._orders.give(Stop(early))
            self._orders.finish()


def serve(
    model: MegatronTeacher,
    layouts: Layouts,
    group: dist.ProcessGroup,
    orders: Orders,
    save: Callable[[int], None],
    publish: Callable[[], object],
    *,
    device: torch.device,
    phases: Phases,
    window: int = WINDOW,
) -> bool:
    """What every rank of the teacher does until it is stopped. `save(step)` and `publish()` take part in writing a
    checkpoint.

    Returns whether the run has come to its last step.
    """
    outbox = Outbox(group, window)
    while True:
        with phases(ORDERS):
            order = orders.take()
        match order:
            case Score():
                with phases(TEACHER):
                    _score(order, model, layouts, outbox, device)
            case Save(step):
                with phases(SAVE):
                    save(step)
            case Publish():
                with phases(SAVE):
                    publish()
            case Stop(early):
                outbox.flush()
                return not early


def _score(
    order: Score, model: MegatronTeacher, layouts: Layouts, outbox: Outbox, device: torch.device
) -> None:
    """Forward this replica's microbatches; each payload is sent while the next is made."""
    whole, cp = in_order(order.packed), model.groups.cp
    work = layouts.work(whole, model.groups.dp.rank())
    outgoing = by_number(route for route in layouts.routes(whole) if route.sender == dist.get_rank())
    numbers = (number for number, _ in work)

    def send(payload: TeacherPayload) -> None:
        number = next(numbers)
        if number is not None:
            outbox.send(payload, outgoing.get(number, []), model.form.of_kind(order.kind))

    shares = [microbatch.shard(cp.rank(), cp.size()).to(device) for _, microbatch in work]
    model.hand_over(shares, send, order.kind)
