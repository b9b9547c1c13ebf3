"""The zigzag order against Megatron's own slicing, there and back over gloo, and token weights of shards."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from torch import Tensor

from megatron_opd.objectives import token_weights
from megatron_opd.objectives.context_parallel import gather_sequence, zigzag_positions
from tests.gloo_pool import GlooPools
from tests.objectives.packs import SETTINGS, Packed, pack
from tools.bench.traffic import Call, recorded_traffic

OFFSETS = torch.tensor([0, 8, 32, 32, 48], dtype=torch.int32)  # divisible by 2 * 4, one segment empty


def test_zigzag_written_out() -> None:
    cu_seqlens = torch.tensor([0, 4, 12])
    assert zigzag_positions(cu_seqlens, 0, 2).tolist() == [0, 3, 4, 5, 10, 11]
    assert zigzag_positions(cu_seqlens, 1, 2).tolist() == [1, 2, 6, 7, 8, 9]


def test_one_rank_holds_everything_whatever_the_lengths() -> None:
    positions = zigzag_positions(torch.tensor([0, 3, 4], dtype=torch.int32), 0, 1)
    assert positions.tolist() == [0, 1, 2, 3] and positions.dtype == torch.int64
    for offsets in ([0], [0, 0]):
        for rank, ranks in ((0, 1), (1, 2)):
            assert zigzag_positions(torch.tensor(offsets), rank, ranks).shape == (0,)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=6), st.integers(1, 5))
def test_every_position_lies_on_one_rank(chunks: list[int], ranks: int) -> None:
    offsets = [0, *itertools.accumulate(2 * ranks * chunk for chunk in chunks)]
    shards = [zigzag_positions(torch.tensor(offsets), rank, ranks).tolist() for rank in range(ranks)]
    assert {len(shard) for shard in shards} == {offsets[-1] // ranks}
    assert sorted(itertools.chain(*shards)) == list(range(offsets[-1]))
    assert all(a < b for shard in shards for a, b in itertools.pairwise(shard))


@pytest.mark.parametrize(
    ("offsets", "rank", "ranks", "message"),
    [
        ([0, 8, 14], 0, 2, r"divisible by 2 \* 2 context-parallel ranks: \[8, 6\]"),
        ([0, 8], 2, 2, "no rank 2 among 2"),
        ([0, 8], -1, 2, "no rank -1 among 2"),
        ([4, 8], 0, 2, "must start at 0 and not decrease"),
        ([0, 8, 4], 0, 1, "must start at 0 and not decrease"),
        ([], 0, 2, "must start at 0 and not decrease"),
    ],
)
def test_what_cannot_be_cut(offsets: list[int], rank: int, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zigzag_positions(torch.tensor(offsets, dtype=torch.int64), rank, ranks)


def megatron_positions() -> Tensor:
    from megatron.core.utils import get_batch_on_this_cp_rank

    held = []
    for start, stop in itertools.pairwise(OFFSETS.tolist()):
        segment = {"tokens": torch.arange(start, stop)[None]}
        held.append(get_batch_on_this_cp_rank(segment, cp_group=dist.group.WORLD)["tokens"][0])
    return torch.cat(held)


@pytest.mark.parametrize("ranks", [2, 4])
def test_order_is_megatrons(gloo: GlooPools, ranks: int) -> None:
    for rank, held in enumerate(gloo(ranks, megatron_positions)):
        assert torch.equal(held, zigzag_positions(OFFSETS, rank, ranks))


def gather_shard(values: Tensor) -> tuple[Tensor, Tensor, list[Call]]:
    """Shard and whole of this rank, and the collectives of the gather."""
    mine = values[:, zigzag_positions(OFFSETS, dist.get_rank(), dist.get_world_size())]
    with recorded_traffic() as calls:
        whole = gather_sequence(mine, OFFSETS, dist.group.WORLD)
    return mine, whole, calls


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_shards_come_back_in_order(gloo: GlooPools, ranks: int, dtype: torch.dtype) -> None:
    values = (100 * torch.randn(3, 48, generator=torch.Generator().manual_seed(0))).to(dtype)
    for mine, whole, calls in gloo(ranks, gather_shard, values):
        assert mine.shape == (3, 48 // ranks)
        assert torch.equal(whole, values) and whole.dtype == dtype
        assert [call.kind for call in calls] == ([] if ranks == 1 else ["all_gather"])


def test_without_a_group_nothing_happens() -> None:
    values = torch.randn(2, 48)
    with recorded_traffic() as calls:
        assert gather_sequence(values, OFFSETS, None) is values
    assert calls == []


def wrong_share() -> tuple[str, list[Call]]:
    with recorded_traffic() as calls, pytest.raises(ValueError) as caught:
        gather_sequence(torch.zeros(1, 20), OFFSETS, dist.group.WORLD)
    return str(caught.value), calls


def test_a_shard_of_the_wrong_size_is_refused_before_communication(gloo: GlooPools) -> None:
    for message, calls in gloo(2, wrong_share):
        assert "ends at 48, but 2 context-parallel ranks with 20 positions each hold 40" in message
        assert calls == []


def weigh_shard(batch: Packed, knowns: list[dict[str, Any]]) -> list[tuple[Tensor, list[Call]]]:
    """Weights of this rank's zigzag shard, and the collectives, for each of the settings."""
    gaps, mask, cu_seqlens = batch
    mine = zigzag_positions(cu_seqlens, dist.get_rank(), dist.get_world_size())
    results = []
    for known in knowns:
        with recorded_traffic() as calls:
            weights = token_weights(gaps[mine], mask[mine], cu_seqlens, group=dist.group.WORLD, **known)
        results.append((weights, calls))
    return results


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_context_parallel_equals_the_whole_to_the_bit(
    gloo: GlooPools, ranks: int, dtype: torch.dtype
) -> None:
    parts = []
    for seed, length in enumerate((8, 24, 0, 16, 64)):
        generator = torch.Generator().manual_seed(seed)
        gaps = torch.randn(length, generator=generator).double()
        mask = torch.rand(length, generator=generator) < 0.7
        parts.append((gaps.where(mask, torch.nan).tolist(), mask.tolist()))
    parts[3] = (parts[3][0], [False] * 16)
    gaps, mask, cu_seqlens = pack(parts)
    batch = (gaps.to(dtype), mask, cu_seqlens)
    knowns = [setting | {"unit_mean": unit_mean} for setting in SETTINGS for unit_mean in (False, True)]
    shards = gloo(ranks, weigh_shard, batch, knowns)
    for which, known in enumerate(knowns):
        whole = token_weights(*batch, **known)
        expected = [] if known["kind"] == "uniform" or ranks == 1 else ["all_gather"]
        for rank in range(ranks):
            weights, calls = shards[rank][which]
            assert torch.equal(weights, whole[zigzag_positions(cu_seqlens, rank, ranks)])
            assert weights.dtype == whole.dtype
            assert [call.kind for call in calls] == expected


def test_context_parallel_without_positions(gloo: GlooPools) -> None:
    batch = (torch.zeros(0), torch.zeros(0, dtype=torch.bool), torch.tensor([0, 0]))
    for ((weights, calls),) in gloo(2, weigh_shard, batch, [{"unit_mean": True}]):
        assert weights.shape == (0,) and len(calls) == 1
