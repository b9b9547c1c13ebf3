"""Time and peak memory of calls side by side: alternating runs, medians, allocations counted exactly, as a table."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

LARGEST_DIFFERENCE = {"fp32": 1e-4, "bf16": 1e-2}  # of values and gradients, relative to the largest one

Call = Callable[..., tuple[Tensor, ...]]

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its every start and stop


def synchronize() -> None:
    """Waits for the device, where there is one that runs on its own."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(
    calls: dict[str, Callable[..., Any]], repeats: int, prepare: Callable[[], tuple[Any, ...]] = tuple
) -> dict[str, list[float]]:
    """Seconds of `repeats` rounds in which every call runs once, after a round that does not count.

    prepare() makes a call's arguments, untimed. In a process group the ranks start together, and the slowest
    counts; every rank gets the same lists.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            arguments = prepare()
            if dist.is_initialized():
                dist.barrier()
            synchronize()
            start = time.perf_counter()
            kept = call(*arguments)
            synchronize()
            seconds[name].append(time.perf_counter() - start)
            del kept, arguments
    seconds = {name: taken[1:] for name, taken in seconds.items()}
    if not dist.is_initialized():
        return seconds
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, seconds)
    return {
        name: [max(taken) for taken in zip(*(rank[name] for rank in ranks), strict=True)] for name in calls
    }


def median_ratio(one: list[float], other: list[float]) -> float:
    """Median of one / other round by round: what slows down a whole round does not move it."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def peak_extra(call: Callable[[], Any]) -> int:
    """Most bytes of tensors that `call` has alive at once, without what it got and without what it returns.

    From the profiler's record of every allocation, on the GPU if there is one. Scratch memory that libraries
    (matrix products, collectives) take past torch's allocators is not seen.
    """
    synchronize()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        returned = call()
        synchronize()
    kept = {tensor.untyped_storage().data_ptr() for tensor in _tensors(returned)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert profiler.profiler is not None
    events = [
        (event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr)
        for event in _allocations(profiler.profiler.kineto_results.experimental_event_tree())
        if event.extra_fields.device.type == device
    ]
    changes = []
    unreleased: dict[int, int] = {}  # address -> index of its allocation
    for index, (_, size, address) in enumerate(sorted(events)):
        if size > 0:
            unreleased[address] = index
            changes.append(size)
        else:  # what was there before the call does not count when it goes
            changes.append(size if unreleased.pop(address, None) is not None else 0)
    for address in kept & unreleased.keys():
        changes[unreleased[address]] = 0
    return max(itertools.accumulate(changes), default=0)


def _allocations(events: list[Any]) -> Iterator[Any]:
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event
        yield from _allocations(event.children)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def largest_difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Over all pairs of tensors, relative to the largest number of each."""
    return max(
        float((a.float() - b.float()).abs().max() / b.float().abs().max())
        for a, b in zip(one, other, strict=True)
    )


def table_of(
    title: str,
    calls: dict[str, Call],
    prepare: Callable[[], tuple[Any, ...]],
    precision: str,
    repeats: int,
    floors: dict[str, Call] | None = None,
) -> tuple[Table, dict[str, list[float]]]:
    """Times, ratios to the first call, memory and differences from it; SystemExit where they do not agree.

    floors are timed in the same rounds and compute something else.
    """
    seconds = alternate(calls | (floors or {}), repeats, prepare)
    first = next(iter(calls))
    truth = calls[first](*prepare())
    table = Table("", "ms", f"x {first}", "extra MiB", "x", "difference", title=title)
    least: int | None = None
    for name in seconds:
        cells = [
            name,
            f"{1e3 * statistics.median(seconds[name]):.1f}",
            f"{median_ratio(seconds[name], seconds[first]):.2f}",
        ]
        if name in calls:
            extra = peak_extra(partial(calls[name], *prepare()))
            least = extra if least is None else least
            difference = largest_difference(calls[name](*prepare()), truth)
            if not difference <= LARGEST_DIFFERENCE[precision]:
                raise SystemExit(f"{title}: {name} differs from {first} by {difference:.1e}")
            cells += [f"{extra / 2**20:.1f}", f"{extra / least:.1f}", f"{difference:.1e}"]
        table.add_row(*cells)
    return table, seconds


def show(table: Table) -> None:
    """Prints it, on the first rank."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        Console(width=110).print(table)
