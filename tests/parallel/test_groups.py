"""Process groups: sizes and members for every layout, and two layouts side by side."""

import pytest
import torch
import torch.distributed as dist

from megatron_opd.parallel.groups import ParallelLayout, build_groups

LAYOUTS = [
    ParallelLayout(tensor=2, pipeline=2),
    ParallelLayout(data=4),
    ParallelLayout(tensor=2, data=2),
    ParallelLayout(pipeline=2, data=2),
    ParallelLayout(pipeline=4),
    ParallelLayout(context=2, data=2),
    ParallelLayout(tensor=2, context=2),
]


def _members(layout: ParallelLayout) -> dict[str, list[int]]:
    groups = build_groups(layout)
    names = ("tp", "pp", "dp", "cp", "mp", "dp_cp", "embd", "pos_embd", "ep")
    found = {name: getattr(groups, name) for name in names}
    return {name: dist.get_process_group_ranks(group) for name, group in found.items() if group is not None}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sizes_and_membership(gloo, layout):
    results = gloo(4, _members, layout)
    for rank, members in enumerate(results):
        assert len(members["tp"]) == layout.tensor
        assert len(members["pp"]) == layout.pipeline
        assert len(members["dp"]) == layout.data
        assert len(members["cp"]) == layout.context and len(members["dp_cp"]) == layout.context * layout.data
        assert len(members["mp"]) == layout.tensor * layout.pipeline
        assert all(rank in ranks for ranks in members.values())
        first, last = members["pp"][0], members["pp"][-1]
        assert ("embd" in members) == (rank in (first, last))
        assert ("pos_embd" in members) == (rank == first)
        assert members["ep"] == [rank]
    tensor_neighbours = [members["tp"] for members in results]
    assert tensor_neighbours[0] == list(range(layout.tensor)), "tensor-parallel ranks are neighbours"


@pytest.mark.parametrize(
    ("layout", "alignment"),
    [
        (ParallelLayout(tensor=2, data=2), 1),
        (ParallelLayout(tensor=2, sequence_parallel=True), 2),
        (ParallelLayout(context=4), 8),
        (ParallelLayout(context=2, tensor=2), 4),
        (ParallelLayout(context=2, tensor=4, sequence_parallel=True), 16),
    ],
    ids=str,
)
def test_what_segments_are_padded_to(layout, alignment):
    """Two chunks for each context-parallel rank, one part of its share for each sequence-parallel rank."""
    assert layout.segment_alignment == alignment


def _two_models() -> float:
    first = build_groups(ParallelLayout(tensor=2), rank_offset=0)
    second = build_groups(ParallelLayout(pipeline=2), rank_offset=2)
    value = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(value, group=first.tp if dist.get_rank() < 2 else second.pp)
    return float(value)


def test_two_layouts_live_side_by_side(gloo):
    assert gloo(4, _two_models) == [3.0, 3.0, 7.0, 7.0]


EXPERT_LAYOUTS = [
    (ParallelLayout(data=4, expert=2), [[0, 1], [2, 3]], [[0, 2], [1, 3]]),
    (ParallelLayout(tensor=2, data=2, expert=2), [[0, 1], [2, 3]], [[0, 2], [1, 3]]),
    (ParallelLayout(tensor=2, data=2, expert=4), [[0, 1, 2, 3]], [[0], [1], [2], [3]]),
    (ParallelLayout(pipeline=2, data=2, expert=2), [[0, 1], [2, 3]], [[0], [1], [2], [3]]),
    (ParallelLayout(tensor=2, data=2), [[0], [1], [2], [3]], [[0, 1, 2, 3]]),
]


def _expert_members(layout: ParallelLayout) -> dict[str, list[int]]:
    groups = build_groups(layout)
    names = ("ep", "expt_dp", "expt_tp", "tp_ep", "tp_ep_pp")
    return {name: sorted(dist.get_process_group_ranks(getattr(groups, name))) for name in names}


@pytest.mark.parametrize(("layout", "sharing", "replicas"), EXPERT_LAYOUTS, ids=lambda x: str(x))
def test_experts_are_shared_among_neighbours(gloo, layout, sharing, replicas):
    """`sharing` ranks have different experts, `replicas` the same ones; an expert is never cut."""
    for rank, members in enumerate(gloo(4, _expert_members, layout)):
        assert members["ep"] == members["tp_ep"] and members["ep"] in sharing
        assert members["expt_dp"] in replicas and members["expt_tp"] == [rank]
        assert len(members["tp_ep_pp"]) == layout.expert * layout.pipeline
        assert all(rank in ranks for ranks in members.values())
