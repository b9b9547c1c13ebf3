"""Routes of payload rows between two layouts: whatever these are, every needed row arrives once, from who holds it."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.data.packing import Microbatch, pack
from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.teacher.transport import Layouts, in_order, rows_of_share
from tests.tiny import recorded_rollouts

SIZES = st.builds(
    ParallelLayout,
    tensor=st.integers(1, 3),
    pipeline=st.integers(1, 2),
    context=st.integers(1, 3),
    data=st.integers(1, 3),
)


def whole_microbatches(
    layouts: Layouts, count: int, seed: int, *, truncated: bool = False
) -> list[Microbatch]:
    """Of `count` uneven rollouts."""
    alignment = math.lcm(layouts.student.segment_alignment, layouts.teacher.segment_alignment)
    rollouts = recorded_rollouts(count, seed=seed, longest=20)
    return in_order(pack(rollouts, dp_size=layouts.student.data, token_budget=96, alignment=alignment))


def places(layout: ParallelLayout, data: int) -> list[tuple[int, int]]:
    """(rank, context-parallel rank) on the last stage of a replica."""
    last = layout.pipeline - 1
    return [
        (layout.rank(tensor=tensor, context=context, data=data, pipeline=last), context)
        for context in range(layout.context)
        for tensor in range(layout.tensor)
    ]


@settings(max_examples=60)
@given(SIZES, SIZES, st.booleans(), st.integers(0, 7), st.integers(0, 99))
def test_every_needed_row_arrives_exactly_once(
    student: ParallelLayout, teacher: ParallelLayout, separate: bool, count: int, seed: int
) -> None:
    layouts = Layouts(student, teacher, student.world_size if separate else 0)
    whole = whole_microbatches(layouts, count, seed)
    replica_of = {n: replica for replica, numbers in enumerate(layouts.dealt(whole)) for n in numbers}
    arrived: dict[tuple[int, int], list[int]] = {}
    for route in layouts.routes(whole):
        holders = {layouts.first + rank: c for rank, c in places(teacher, replica_of[route.number])}
        held = rows_of_share(whole[route.number], holders[route.sender], teacher.context)
        receivers = dict(places(student, route.number % student.data))
        needed = rows_of_share(whole[route.number], receivers[route.receiver], student.context)
        assert torch.equal(held[route.taken_M], needed[route.placed_M]) and len(route.taken_M) > 0
        arrived.setdefault((route.number, route.receiver), []).extend(route.placed_M.tolist())
        if route.receiver in holders and holders[route.receiver] == holders[route.sender]:
            assert route.sender == route.receiver, "a rank asks for what it holds"
    for number, microbatch in enumerate(whole):
        for rank, context in places(student, number % student.data):
            rows = len(rows_of_share(microbatch, context, student.context))
            assert sorted(arrived.get((number, rank), [])) == list(range(rows))


@given(SIZES, SIZES, st.integers(0, 7), st.integers(0, 99))
def test_the_teachers_replicas_share_the_microbatches_evenly(
    student: ParallelLayout, teacher: ParallelLayout, count: int, seed: int
) -> None:
    layouts = Layouts(student, teacher, 0)
    whole = whole_microbatches(layouts, count, seed)
    work = [layouts.work(whole, replica) for replica in range(teacher.data)]
    assert len({len(each) for each in work}) == 1
    numbers = sorted(number for each in work for number, _ in each if number is not None)
    assert numbers == [number for number, each in enumerate(whole) if each.mask_T.any()]
    assert sum(number is None for each in work for number, _ in each) < teacher.data
    for each in work:
        forwarded = [number for number, _ in each if number is not None]
        assert forwarded == sorted(forwarded)


def test_an_interleaved_teacher_gets_microbatches_in_groups() -> None:
    layouts = Layouts(ParallelLayout(), ParallelLayout(pipeline=2, virtual_pipeline=2), 0)
    whole = whole_microbatches(layouts, 4, 0)
    assert sum(bool(each.mask_T.any()) for each in whole) % 2 == 1, "an odd number of microbatches"
    work = layouts.work(whole, 0)
    assert len(work) % 2 == 0 and work[-1][0] is None and not work[-1][1].mask_T.any()


@pytest.mark.parametrize(("tensor", "expected"), [(1, [4]), (2, [2, 2]), (4, [1, 1, 1, 1])])
def test_messages_are_spread_over_the_ranks_that_hold_the_rows(tensor: int, expected: list[int]) -> None:
    layouts = Layouts(ParallelLayout(tensor=2, context=2), ParallelLayout(tensor=tensor), 4)
    whole = whole_microbatches(layouts, 4, 0)
    sent = Counter(route.sender for route in layouts.routes(whole) if route.number == 0)
    assert sorted(sent.values()) == expected
