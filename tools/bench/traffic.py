"""What a piece of code sends: every collective and every send of this rank, recorded below torch.distributed.

    with recorded_traffic() as calls:
        ...
    by_group(calls, group_names(groups))

The calls are seen where torch hands them to the backend, so it does not matter through which function or under which
name they were made, nor whether autograd made them in a backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# torch's operator -> (kind, place of what this rank gives among its arguments)
_OPERATORS: dict[str, tuple[str, int]] = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "allgather_": ("all_gather", 1),
    "_allgather_base_": ("all_gather", 1),
    "allgather_into_tensor_coalesced_": ("all_gather", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_": ("all_to_all", 1),
    "alltoall_base_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 1),
    "send": ("send", 0),
    "barrier": ("barrier", 0),
}
_RECEIVING = ("recv_", "recv_any_source_")  # the sender counts


@dataclass(frozen=True)
class Call:
    """One call: its kind, the name torch gave the group, the group's size, and what this rank gave."""

    kind: str
    group: str
    ranks: int
    numel: int
    nbytes: int

    @property
    def sent_bytes(self) -> float:
        """Bytes this rank sends when the collective runs around a ring; all-to-all with equal shares."""
        others = self.ranks - 1
        factors = {"all_reduce": 2 * others / self.ranks, "all_gather": others, "send": 1, "barrier": 0}
        return self.nbytes * factors.get(self.kind, others / self.ranks)


@contextlib.contextmanager
def recorded_traffic() -> Iterator[list[Call]]:
    """The calls of this rank while the block runs, in order."""
    mode = _Recorder()
    with mode:
        yield mode.calls


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._record(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _record(self, operator: str, args: Sequence[Any]) -> None:
        if operator in _RECEIVING:
            return
        kind, place = _OPERATORS[operator]
        group = next(_group_of(value) for value in args if isinstance(value, torch.ScriptObject))
        given = [] if kind == "barrier" else list(_tensors(args[place]))
        numel = sum(tensor.numel() for tensor in given)
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in given)
        self.calls.append(Call(kind, group.group_name, group.size(), numel, nbytes))


def _group_of(boxed: torch.ScriptObject) -> dist.ProcessGroup:
    group = dist.ProcessGroup.unbox(boxed)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    else:
        for part in given:
            yield from _tensors(part)


def group_names(groups: ProcessGroupCollection) -> dict[str, str]:
    """torch's name of each group -> its name in the collection (the first, where it has several)."""
    names: dict[str, str] = {}
    for name, group in vars(groups).items():
        if isinstance(group, dist.ProcessGroup):
            names.setdefault(group.group_name, name)
    return names


@dataclass
class Volume:
    """Sums over the calls of one kind in one group."""

    calls: int = 0
    nbytes: int = 0
    sent_bytes: float = 0.0


def by_group(calls: Sequence[Call], names: dict[str, str]) -> dict[tuple[str, str], Volume]:
    """(group, kind) -> volume, of groups with more than one rank; a group without a name is "other"."""
    volumes: dict[tuple[str, str], Volume] = {}
    for call in calls:
        if call.ranks > 1:
            volume = volumes.setdefault((names.get(call.group, "other"), call.kind), Volume())
            volume.calls += 1
            volume.nbytes += call.nbytes
            volume.sent_bytes += call.sent_bytes
    return volumes
