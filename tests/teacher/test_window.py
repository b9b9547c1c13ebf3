"""Payloads and orders on their way: never more of them than the window, and nobody waits who need not."""

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_opd.data.packing import pack
from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.teacher.orders import Orders, Save, Score, Stop
from megatron_opd.teacher.payload import HiddenStates, PayloadFormat, tensors_of
from megatron_opd.teacher.transport import Arrival, Layouts, by_number, in_order
from megatron_opd.teacher.window import Inbox, Outbox
from tests.tiny import recorded_rollouts

FORM = PayloadFormat("hidden_states", 3, 250, torch.float32)
LAYOUTS = Layouts(ParallelLayout(), ParallelLayout(), first=1)  # rank 0 is the student, rank 1 the teacher


def _live(kind: type) -> int:
    return sum(type(each) is kind for each in gc.get_objects())


def _hidden(number: int, rows: int) -> torch.Tensor:
    return number + torch.arange(3.0 * rows).view(rows, 3) / 1000


def _ship(window: int) -> tuple[int, int]:
    """(payloads shipped, the most that were held at once) of this side."""
    whole = in_order(pack(recorded_rollouts(20), dp_size=1, token_budget=64))
    routes = by_number(LAYOUTS.routes(whole))
    rows = [int(each.mask_T.sum()) for each in whole]
    group = dist.new_group([0, 1])
    most = 0
    if dist.get_rank() == 0:
        inbox = Inbox(group, torch.device("cpu"), window)
        awaited = [inbox.expect(routes[number], rows[number], FORM) for number in range(len(whole))]
        for number, each in enumerate(awaited):
            most = max(most, _live(Arrival))
            (hidden_ND,) = tensors_of(each.wait())
            assert torch.equal(hidden_ND, _hidden(number, rows[number]))
    else:
        outbox = Outbox(group, window)
        for number in range(len(whole)):
            outbox.send(HiddenStates(_hidden(number, rows[number])), routes[number], FORM)
            most = max(most, _live(dist.P2POp))
        outbox.flush()
        assert _live(dist.P2POp) == 0
    return len(whole), most


@pytest.mark.parametrize("window", [1, 3])
def test_no_more_payloads_are_held_than_the_window(gloo: Any, window: int) -> None:
    for shipped, most in gloo(2, _ship, window):
        assert shipped > 3 * window and most == window


def _ahead() -> int:
    """The teacher makes a window of payloads before the student is ready to receive any."""
    whole = in_order(pack(recorded_rollouts(20), dp_size=1, token_budget=64))
    routes = by_number(LAYOUTS.routes(whole))
    group, other = dist.new_group([0, 1]), dist.new_group([0, 1])
    if dist.get_rank() == 0:
        dist.barrier(other)
        inbox = Inbox(group, torch.device("cpu"), 1)
        return sum(
            len(tensors_of(inbox.expect(routes[n], int(whole[n].mask_T.sum()), FORM).wait())[0])
            for n in range(2)
        )
    outbox = Outbox(group, 2)
    for n in range(2):
        rows = int(whole[n].mask_T.sum())
        outbox.send(HiddenStates(_hidden(n, rows)), routes[n], FORM)
    dist.barrier(other)
    outbox.flush()
    return sum(int(whole[n].mask_T.sum()) for n in range(2))


def test_the_teacher_runs_ahead_of_the_student(gloo: Any) -> None:
    received, sent = gloo(2, _ahead)
    assert received == sent > 0


def _orders() -> list[Any]:
    """The student gives all its orders before the teacher takes the first."""
    packed = pack(recorded_rollouts(5), dp_size=2, token_budget=96)
    group, other = dist.new_group([0, 1], backend="gloo"), dist.new_group([0, 1])
    orders = Orders(group)
    if dist.get_rank() == 0:
        for order in (Score.of(packed, None), Score.of(packed, "hidden_states"), Save(7), Stop()):
            orders.give(order)
        dist.barrier(other)
        orders.finish()
        return []
    dist.barrier(other)
    taken = [orders.take() for _ in range(4)]
    first = taken[0]
    assert isinstance(first, Score)
    for found, expected in zip(in_order(first.packed), in_order(packed), strict=True):
        for name in ("tokens_T", "position_ids_T", "targets_T", "mask_T", "cu_seqlens"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
    return [getattr(each, "kind", None) or getattr(each, "step", None) for each in taken]


def test_orders_are_given_without_waiting(gloo: Any) -> None:
    assert gloo(2, _orders)[1] == [None, "hidden_states", 7, None]
