"""KeptIds: what is put in comes out, by token, by shard and after selection."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.objectives import KeptIds, topk_divergence, vocab_parallel_divergence

VOCAB = 24
rows_of_ids = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=6, unique=True), max_size=7)


@given(rows_of_ids, rows_of_ids)
def test_lists_joined_and_pickled(rows: list[list[int]], others: list[list[int]]) -> None:
    kept, more = KeptIds.of(rows), KeptIds.of(others)
    assert kept.lists() == rows and len(kept) == len(rows) and kept.ids_E.dtype == torch.int32
    assert KeptIds.joined([kept, more]).lists() == rows + others
    assert (kept == more) == (rows == others) and pickle.loads(pickle.dumps(kept)) == kept


@given(rows_of_ids, st.data())
def test_selection_and_membership(rows: list[list[int]], data: st.DataObject) -> None:
    kept = KeptIds.of(rows)
    order = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=9)) if rows else []
    assert kept.at(torch.tensor(order, dtype=torch.int64)).lists() == [rows[token] for token in order]
    ids = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=len(rows), max_size=len(rows)))
    expected = [token in row for token, row in zip(ids, rows, strict=True)]
    assert kept.hold(torch.tensor(ids, dtype=torch.int32)).tolist() == expected


@given(rows_of_ids, st.sampled_from([1, 2, 4]), st.integers(0, 7), st.integers(0, 7))
def test_shards_of_what_was_left_out(rows: list[list[int]], shards: int, start: int, stop: int) -> None:
    start, stop = sorted((min(start, len(rows)), min(stop, len(rows))))
    width = VOCAB // shards
    parts = [
        KeptIds.of(rows).left_out(slice(start, stop), first=rank * width, columns=width)
        for rank in range(shards)
    ]
    expected = [[v not in row for v in range(VOCAB)] for row in rows[start:stop]]
    assert torch.cat(parts, 1).tolist() == expected


def test_ids_of_other_tokens_or_of_a_server_are_refused() -> None:
    logits = torch.zeros(2, VOCAB)
    with pytest.raises(ValueError, match="kept has the ids of 1 tokens, not of 2"):
        vocab_parallel_divergence(logits, logits, kept=KeptIds.of([[1]]))
    served = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1)
    with pytest.raises(ValueError, match="kept: the ids of a server"):
        topk_divergence(logits, served, kept=KeptIds.of([[1], [2]]))
