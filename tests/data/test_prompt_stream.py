"""The order of prompts: every one once an epoch, fixed by the seed, resumable anywhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.data.prompts import Prompt, PromptStream
from megatron_opd.errors import UserError

PINNED = ["6", "3", "0", "4", "7", "2", "1", "5"]


def prompts(count: int) -> list[Prompt]:
    return [Prompt(str(row), [row], f"text {row}") for row in range(count)]


@given(count=st.integers(1, 12), seed=st.integers(0, 5), epochs=st.integers(1, 3))
def test_every_epoch_draws_every_prompt_once(count, seed, epochs):
    drawn = PromptStream(prompts(count), seed).take(count * epochs)
    for epoch in range(epochs):
        ids = {prompt.id for prompt in drawn[epoch * count : (epoch + 1) * count]}
        assert ids == {f"{row}@{epoch}" for row in range(count)}


@given(
    count=st.integers(1, 12),
    seed=st.integers(0, 5),
    takes=st.lists(st.integers(0, 9), max_size=8),
    data=st.data(),
)
def test_resuming_continues_exactly(count, seed, takes, data):
    whole = PromptStream(prompts(count), seed)
    batches = [whole.take(n) for n in takes]
    stop = data.draw(st.integers(0, len(takes)))
    first = PromptStream(prompts(count), seed)
    for n in takes[:stop]:
        first.take(n)
    resumed = PromptStream(prompts(count), seed)
    resumed.load_state_dict(first.state_dict())
    assert [resumed.take(n) for n in takes[stop:]] == batches[stop:]


def test_the_batch_size_does_not_change_the_order():
    one, two = PromptStream(prompts(7), 3), PromptStream(prompts(7), 3)
    assert one.take(20) == [prompt for _ in range(10) for prompt in two.take(2)]


def test_what_is_seen_ahead_is_what_comes_and_moves_nothing():
    stream = PromptStream(prompts(7), 3)
    ahead = stream.peek(4, skip=5)
    assert stream.state_dict() == {"position": 0}
    assert stream.take(9)[5:] == ahead


def test_epochs_and_seeds_differ_and_the_order_is_pinned():
    drawn = [prompt.id for prompt in PromptStream(prompts(8), 0).take(16)]
    first, second = [i.split("@")[0] for i in drawn[:8]], [i.split("@")[0] for i in drawn[8:]]
    other = [prompt.id.split("@")[0] for prompt in PromptStream(prompts(8), 1).take(8)]
    assert first != second and first != other
    assert first == PINNED, "a changed order breaks the resumption of runs that older versions started"


def test_without_shuffling_the_order_is_that_of_the_file():
    ids = [prompt.id for prompt in PromptStream(prompts(3), 0, shuffle=False).take(5)]
    assert ids == ["0@0", "1@0", "2@0", "0@1", "1@1"]


def test_more_prompts_than_there_are_wrap_with_ids_of_their_own():
    drawn = PromptStream(prompts(2), 0).take(6)
    assert len({prompt.id for prompt in drawn}) == 6


def test_no_prompts():
    with pytest.raises(UserError, match=r"data\.prompts"):
        PromptStream([], 0)
