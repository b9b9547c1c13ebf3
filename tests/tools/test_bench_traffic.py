"""The recorder of traffic sees every way to communicate, with its group, and counts what is given and sent."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_opd.parallel import cpu
from tools.bench.traffic import Call, Volume, by_group, group_names, recorded_traffic

RANKS = 4


def _collectives() -> tuple[list[Call], dict[str, str]]:
    groups = ProcessGroupCollection(tp=dist.new_group(list(range(RANKS))), dp=dist.group.WORLD)
    x = torch.ones(8)
    with recorded_traffic() as calls:
        dist.all_reduce(x, group=groups.tp)
        dist.all_gather_into_tensor(torch.empty(8 * RANKS), x, group=groups.tp)
        dist.all_gather([torch.empty(8) for _ in range(RANKS)], x)
        dist.reduce_scatter_tensor(torch.empty(2), x)
        dist.all_to_all_single(torch.empty(8), x)
        dist.broadcast(x.double(), 0)
        dist.barrier()
    return calls, group_names(groups)


def test_collectives(gloo):
    for calls, names in gloo(RANKS, _collectives):
        expected = [
            # kind, numbers given, bytes given, bytes sent: a ring's
            ("tp", "all_reduce", 8, 32, 48.0),
            ("tp", "all_gather", 8, 32, 96.0),
            ("dp", "all_gather", 8, 32, 96.0),
            ("dp", "reduce_scatter", 8, 32, 24.0),
            ("dp", "all_to_all", 8, 32, 24.0),
            ("dp", "broadcast", 8, 64, 48.0),
            ("dp", "barrier", 0, 0, 0.0),
        ]
        found = [(names[c.group], c.kind, c.numel, c.nbytes, c.sent_bytes) for c in calls]
        assert found == expected and {call.ranks for call in calls} == {RANKS}
        volumes = by_group([*calls, calls[0]], names)
        assert volumes["tp", "all_reduce"] == Volume(2, 64, 96.0)
        assert volumes["dp", "all_gather"] == Volume(1, 32, 96.0)


def _autograd_and_sends() -> tuple[list[Call], list[Call], int]:
    cpu.install()
    other, x = 1 - dist.get_rank(), torch.ones(6, 1, requires_grad=True)
    with recorded_traffic() as collectives:
        gather_from_sequence_parallel_region(x, group=dist.group.WORLD).sum().backward()
    operations = [
        dist.P2POp(dist.isend, x.detach(), other),
        dist.P2POp(dist.irecv, torch.empty(6, 1), other),
    ]
    with recorded_traffic() as sends:
        for request in dist.batch_isend_irecv(operations):
            request.wait()
    with recorded_traffic() as nothing:
        torch.ones(3).sum()
    return collectives, sends, len(nothing)


def test_backward_passes_and_sends(gloo):
    """megatron-core holds torch's collectives under names of its own; a receive is its sender's."""
    for collectives, sends, nothing in gloo(2, _autograd_and_sends):
        assert [(call.kind, call.numel) for call in collectives] == [
            ("all_gather", 6),
            ("reduce_scatter", 12),
        ]
        assert [(call.kind, call.nbytes, call.sent_bytes) for call in sends] == [("send", 24, 24)]
        assert nothing == 0


def _alone() -> dict[Any, Any]:
    with recorded_traffic() as calls:
        dist.all_reduce(torch.ones(3))
    assert len(calls) == 1 and calls[0].sent_bytes == 0
    return by_group(calls, {})


def test_a_group_of_one_rank_sends_nothing(gloo):
    assert gloo(1, _alone) == [{}]
