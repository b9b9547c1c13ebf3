"""Packing: nothing lost, nothing doubled, every target where it belongs, budgets kept, ranks in step."""

from collections import Counter
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.data.loss_mask import LossMask
from megatron_opd.data.packing import Microbatch, count_loss_tokens, count_tokens, pack
from megatron_opd.data.rollouts import Rollout
from megatron_opd.errors import UserError
from megatron_opd.objectives import KeptIds, zigzag_positions

BUDGET = 48


def rollout(prompt: list[int], response: list[int], name: int = 0) -> Rollout:
    # Log-probs and kept ids that tell which token of which rollout they belong to.
    logprobs = [-(name + (i + 1) / 128) for i in range(len(response))]
    drawn = [logprob + 1 / 256 for logprob in logprobs]
    kept = KeptIds.of([[1000 + i] * (i % 3) + [token] for i, token in enumerate(response)])
    return Rollout(str(name), 0, prompt, response, logprobs, "length", 0, drawn_logprobs=drawn, kept_ids=kept)


@st.composite
def rollout_lists(draw: st.DrawFn) -> list[Rollout]:
    shapes = draw(st.lists(st.tuples(st.integers(1, 16), st.integers(0, 24)), max_size=24))
    ids = st.integers(1, 999)
    return [
        rollout(
            draw(st.lists(ids, min_size=p, max_size=p)), draw(st.lists(ids, min_size=r, max_size=r)), name
        )
        for name, (p, r) in enumerate(shapes)
    ]


def tensors(microbatch: Microbatch) -> dict[str, Any]:
    """All of it; nothing here is for a teacher with prompts of its own."""
    assert microbatch.teacher is None
    return {name: value for name, value in vars(microbatch).items() if name != "teacher"}


def segments(microbatch: Microbatch) -> list[slice]:
    offsets = microbatch.cu_seqlens.tolist()
    return [slice(a, b) for a, b in pairwise(offsets)]


def loss_positions(packed: list[list[Microbatch]]) -> Counter:
    """(input token, target, log-prob, drawn log-prob, kept ids) of every loss position."""
    found: Counter = Counter()
    for rank in packed:
        for m in rank:
            mask = m.mask_T
            columns = (
                m.tokens_T[mask].tolist(),
                m.targets_T[mask].tolist(),
                m.rollout_logprobs_T[mask].tolist(),
                m.drawn_logprobs_T[mask].tolist(),
                map(tuple, m.kept_N().lists()),
            )
            found.update(zip(*columns, strict=True))
    return found


def expected_positions(rollouts: list[Rollout]) -> Counter:
    found: Counter = Counter()
    for r in rollouts:
        sequence = r.prompt_ids + r.response_ids
        logprobs = torch.tensor(r.logprobs, dtype=torch.float32).tolist()
        drawn = torch.tensor(r.drawn_logprobs, dtype=torch.float32).tolist()
        columns = zip(r.response_ids, logprobs, drawn, map(tuple, r.kept_ids.lists()), strict=True)
        for i, column in enumerate(columns):
            found[(sequence[len(r.prompt_ids) + i - 1], *column)] += 1
    return found


def all_equal(a: list[list[Microbatch]], b: list[list[Microbatch]]) -> bool:
    flat_a = [tensor for rank in a for m in rank for tensor in tensors(m).values()]
    flat_b = [tensor for rank in b for m in rank for tensor in tensors(m).values()]
    return len(flat_a) == len(flat_b) and all(
        x == y if isinstance(x, KeptIds) else torch.equal(x, y) for x, y in zip(flat_a, flat_b, strict=True)
    )


layouts = st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 4, 8]))


@given(rollout_lists(), layouts)
def test_every_response_token_appears_once_with_its_target_and_logprob(rollouts, layout):
    dp_size, alignment = layout
    packed = pack(rollouts, dp_size=dp_size, token_budget=BUDGET, alignment=alignment)
    assert loss_positions(packed) == expected_positions(rollouts)
    assert sum(count_loss_tokens(rank) for rank in packed) == sum(len(r.response_ids) for r in rollouts)


@given(rollout_lists(), layouts)
def test_shapes_budgets_and_alignment(rollouts, layout):
    dp_size, alignment = layout
    packed = pack(rollouts, dp_size=dp_size, token_budget=BUDGET, alignment=alignment)
    assert len(packed) == dp_size
    assert len({len(rank) for rank in packed}) == 1 and packed[0]
    for m in (m for rank in packed for m in rank):
        total = len(m.tokens_T)
        assert 0 < total <= BUDGET
        assert m.cu_seqlens.dtype == torch.int32 and m.cu_seqlens[0] == 0 and m.cu_seqlens[-1] == total
        assert {len(t) for n, t in tensors(m).items() if n != "cu_seqlens"} == {total}
        for segment in segments(m):
            length = segment.stop - segment.start
            assert length > 0 and length % alignment == 0
            assert torch.equal(m.position_ids_T[segment], torch.arange(length))
        assert not m.targets_T[~m.mask_T].any() and not m.rollout_logprobs_T[~m.mask_T].any()
        assert not m.drawn_logprobs_T[~m.mask_T].any() and not m.kept_T.counts_N[~m.mask_T].any()


@given(rollout_lists(), layouts)
def test_each_segment_is_one_rollout_without_its_last_token(rollouts, layout):
    dp_size, alignment = layout
    packed = pack(rollouts, dp_size=dp_size, token_budget=BUDGET, alignment=alignment)
    found: Counter = Counter()
    for m in (m for rank in packed for m in rank):
        for segment in segments(m):
            mask = m.mask_T[segment]
            if mask.any():
                end = int(mask.nonzero().max()) + 1
                found[(tuple(m.tokens_T[segment][:end].tolist()), int(mask.sum()))] += 1
                assert not m.tokens_T[segment][end:].any()  # the rest is padding
                assert m.padding_T[segment].tolist() == [False] * end + [True] * (len(mask) - end)
    kept = [r for r in rollouts if r.response_ids]
    tokens = sum(len(r.prompt_ids) + len(r.response_ids) - 1 for r in kept)
    assert count_tokens(m for rank in packed for m in rank) == tokens
    assert found == Counter(((*r.prompt_ids, *r.response_ids[:-1]), len(r.response_ids)) for r in kept)


@given(rollout_lists(), layouts)
def test_same_input_same_output(rollouts, layout):
    dp_size, alignment = layout
    options = {"dp_size": dp_size, "token_budget": BUDGET, "alignment": alignment}
    assert all_equal(pack(rollouts, **options), pack(list(rollouts), **options))


@given(rollout_lists(), layouts, st.frozensets(st.integers(1, 30)), st.sampled_from(["first", "all"]))
def test_a_loss_mask_takes_loss_positions_away_and_nothing_else(rollouts, layout, ids, occurrences):
    dp_size, alignment = layout
    rollouts = [rollout(r.prompt_ids, [1 + token % 30 for token in r.response_ids]) for r in rollouts]
    mask = LossMask(ids, occurrences)
    options = {"dp_size": dp_size, "token_budget": BUDGET, "alignment": alignment}
    masked = pack(rollouts, **options, loss_mask=mask)
    kept = [r for r in rollouts if any(mask.of(r))]
    plain = pack(kept, **options)
    for m, whole in zip(chain(*masked), chain(*plain), strict=True):
        for name in ("tokens_T", "position_ids_T", "cu_seqlens"):
            assert torch.equal(getattr(m, name), getattr(whole, name))
        assert not (m.mask_T & ~whole.mask_T).any()
        for name in ("targets_T", "rollout_logprobs_T"):
            assert torch.equal(getattr(m, name), getattr(whole, name) * m.mask_T)
        assert m.kept_N() == whole.kept_T.at(m.mask_T.nonzero()[:, 0])
    expected = Counter(
        token for r in kept for token, keep in zip(r.response_ids, mask.of(r), strict=True) if keep
    )
    assert Counter(t for m in chain(*masked) for t in m.targets_T[m.mask_T].tolist()) == expected


def test_a_masked_microbatch_by_hand():
    mask = LossMask(frozenset({4}))
    (m,) = pack([rollout([1, 2], [3, 4, 5, 4])], dp_size=1, token_budget=8, loss_mask=mask)[0]
    assert m.tokens_T.tolist() == [1, 2, 3, 4, 5]
    assert m.targets_T.tolist() == [0, 3, 0, 5, 4]
    assert m.mask_T.tolist() == [False, True, False, True, True]
    assert m.rollout_logprobs_T.tolist() == [0.0, -1 / 128, 0.0, -3 / 128, -4 / 128]


def test_rollouts_that_are_masked_whole_are_left_out():
    truncated = rollout([1], [2] * 100)  # longer than the budget, and none of its tokens is wanted
    stopped = replace(rollout([1], [3, 4]), finish_reason="stop")
    mask = LossMask(truncated=True)
    assert pack([truncated, stopped], dp_size=1, token_budget=8, loss_mask=mask)[0][0].tokens_T.tolist() == [
        1,
        3,
    ]
    nothing = pack([truncated], dp_size=2, token_budget=8, loss_mask=mask)
    assert [[count_loss_tokens([m]) for m in rank] for rank in nothing] == [[0], [0]]


def test_one_microbatch_by_hand():
    (m,) = pack([rollout([1, 2], [3, 4, 5])], dp_size=1, token_budget=8, alignment=3)[0]
    assert m.tokens_T.tolist() == [1, 2, 3, 4, 0, 0]
    assert m.targets_T.tolist() == [0, 3, 4, 5, 0, 0]
    assert m.mask_T.tolist() == [False, True, True, True, False, False]
    assert m.position_ids_T.tolist() == [0, 1, 2, 3, 4, 5]
    assert m.padding_T.tolist() == [False, False, False, False, True, True]
    assert m.rollout_logprobs_T.tolist() == [0.0, -1 / 128, -2 / 128, -3 / 128, 0.0, 0.0]
    assert m.cu_seqlens.tolist() == [0, 6]


@given(rollout_lists(), st.sampled_from([2, 4]))
@settings(deadline=None, max_examples=50)
def test_shares_of_context_parallel_ranks_are_the_microbatch(rollouts, ranks):
    """Together they hold every position once; the offsets stay those of the whole."""
    for m in pack(rollouts, dp_size=1, token_budget=BUDGET, alignment=2 * ranks)[0]:
        shares = [m.shard(rank, ranks) for rank in range(ranks)]
        order = torch.cat([zigzag_positions(m.cu_seqlens, rank, ranks) for rank in range(ranks)]).argsort()
        for name, whole in tensors(m).items():
            parts = [getattr(share, name) for share in shares]
            if name == "cu_seqlens":
                assert all(torch.equal(part, whole) for part in parts)
            else:
                assert all(len(part) == len(whole) // ranks for part in parts)
                if name == "kept_T":
                    assert KeptIds.joined(parts).at(order) == whole
                else:
                    assert torch.equal(torch.cat(parts)[order], whole)
        assert m.shard(0, 1) is m


def test_a_share_by_hand():
    (m,) = pack([rollout([1, 2], [3, 4, 5]), rollout([6], [7])], dp_size=1, token_budget=8, alignment=4)[0]
    assert m.tokens_T.tolist() == [1, 2, 3, 4, 6, 0, 0, 0]
    assert m.shard(0, 2).tokens_T.tolist() == [1, 4, 6, 0]
    assert m.shard(1, 2).tokens_T.tolist() == [2, 3, 0, 0]
    assert m.shard(1, 2).position_ids_T.tolist() == [1, 2, 1, 2]


def test_ranks_get_a_balanced_share_of_tokens():
    lengths = [17, 16, 15, 14, 9, 8, 7, 6, 5, 4, 3, 2]
    rollouts = [rollout([1], [2] * length, name) for name, length in enumerate(lengths)]
    packed = pack(rollouts, dp_size=2, token_budget=64)
    loads = [count_loss_tokens(rank) for rank in packed]
    assert abs(loads[0] - loads[1]) <= 2


def test_a_rank_with_too_few_microbatches_splits_instead_of_running_an_empty_one():
    # Rank 0 gets 5 + 4 + 3 tokens and needs two microbatches, rank 1 gets 5 + 4 and would need one.
    rollouts = [rollout([1], [2] * length, name) for name, length in enumerate([5, 5, 4, 4, 3])]
    packed = pack(rollouts, dp_size=2, token_budget=9)
    assert [[count_loss_tokens([m]) for m in rank] for rank in packed] == [[9, 3], [5, 4]]


def test_a_rank_that_cannot_split_runs_an_empty_microbatch_last():
    rollouts = [rollout([1], [2] * length, name) for name, length in enumerate([9, 8, 7])]
    packed = pack(rollouts, dp_size=2, token_budget=10)
    assert [[count_loss_tokens([m]) for m in rank] for rank in packed] == [[9, 0], [8, 7]]


def test_microbatches_come_in_groups():
    """As an interleaved pipeline needs them: the largest are split, empty ones are added last."""
    rollouts = [rollout([1], [2] * length, name) for name, length in enumerate([9, 8, 7])]

    def counts(budget: int, multiple: int) -> list[int]:
        (packed,) = pack(rollouts, dp_size=1, token_budget=budget, count_multiple=multiple)
        return [count_loss_tokens([m]) for m in packed]

    assert counts(30, 1) == [24] and counts(30, 2) == [9, 15]
    assert counts(30, 4) == counts(10, 2) == [9, 8, 7, 0]


def test_a_rank_without_rollouts_runs_one_empty_microbatch():
    packed = pack([rollout([1], [2, 3])], dp_size=2, token_budget=8, alignment=4)
    assert [count_loss_tokens(rank) for rank in packed] == [2, 0]
    (empty,) = packed[1]
    assert empty.cu_seqlens.tolist() == [0, 4] and not empty.mask_T.any() and empty.padding_T.all()


def test_no_rollouts_at_all():
    packed = pack([], dp_size=2, token_budget=8)
    assert [[count_loss_tokens([m]) for m in rank] for rank in packed] == [[0], [0]]


def test_empty_responses_are_left_out():
    rollouts = [rollout([1, 2], []), rollout([1, 2], [3]), rollout([4], [])]
    (m,) = pack(rollouts, dp_size=1, token_budget=8)[0]
    assert m.tokens_T.tolist() == [1, 2]


def test_a_rollout_longer_than_the_budget_is_an_error_naming_the_key():
    with pytest.raises(UserError, match=r"training\.microbatch_tokens = 8 .* 12 tokens"):
        pack([rollout([1] * 5, [2] * 6)], dp_size=1, token_budget=8, alignment=4)


def test_a_budget_below_the_alignment_is_an_error_naming_the_key():
    with pytest.raises(UserError, match=r"training\.microbatch_tokens = 3 .* parallel layout.* 4 or more"):
        pack([], dp_size=1, token_budget=3, alignment=4)


def test_kept_ids_are_packed_of_all_rollouts_or_of_none():
    recorded, plain = rollout([1], [2, 3]), replace(rollout([4], [5], name=1), kept_ids=KeptIds.of())
    (m,) = pack([recorded, plain], dp_size=1, token_budget=8)[0]
    assert len(m.kept_T) == 0
    with pytest.raises(AssertionError, match="without recording"):
        m.kept_N()
    empty = pack([recorded], dp_size=2, token_budget=8)[1][0]
    assert len(empty.kept_N()) == 0
    with pytest.raises(AssertionError, match="from the ids that were kept"):
        pack([replace(recorded, kept_ids=KeptIds.of([[2], [4]]))], dp_size=1, token_budget=8)
