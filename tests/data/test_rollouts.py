"""Rollouts as JSONL: what is read is what was written."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.data.rollouts import Rollout, read_rollouts, write_rollouts
from megatron_opd.errors import UserError
from megatron_opd.objectives import KeptIds

rollouts = st.builds(
    Rollout,
    prompt_id=st.text(max_size=8),
    sample=st.integers(0, 9),
    prompt_ids=st.lists(st.integers(0, 200_000), max_size=5),
    response_ids=st.lists(st.integers(0, 200_000), max_size=5),
    logprobs=st.lists(st.floats(max_value=0, allow_nan=False), max_size=5),
    finish_reason=st.sampled_from(["stop", "length"]),
    weight_version=st.integers(0, 1000),
    drawn_logprobs=st.lists(st.floats(max_value=0, allow_nan=False), max_size=5),
    kept_ids=st.builds(KeptIds.of, st.lists(st.lists(st.integers(0, 200_000), max_size=6), max_size=5)),
    version_changes=st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), max_size=2),
)
ONE = Rollout("3@0", 0, [1, 2], [3], [-0.1], "stop", 4)


@given(st.lists(rollouts, max_size=4))
def test_round_trip_is_lossless(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("rollouts") / "step.jsonl"
    write_rollouts(path, written)
    assert read_rollouts(path) == written


def test_what_a_cut_did_is_written_only_if_there_was_one(tmp_path):
    path = tmp_path / "step.jsonl"
    cut = replace(ONE, drawn_logprobs=[0.0], kept_ids=KeptIds.of([[3, 70000]]))
    write_rollouts(path, [ONE, cut])
    plain, other = map(json.loads, path.read_text().splitlines())
    assert ONE.drawn_logprobs == ONE.logprobs and len(ONE.kept_ids) == 0
    assert set(other) - set(plain) == {"drawn_logprobs", "kept_ids"}
    assert read_rollouts(path) == [ONE, cut] and read_rollouts(path)[1].kept_ids.lists() == [[3, 70000]]


def test_every_token_has_the_version_of_its_weights():
    assert ONE.token_versions == [4]
    cut = Rollout("3@0", 0, [1], [2, 3, 4, 5], [-0.1] * 4, "length", 4, [[1, 5], [3, 7]])
    assert cut.token_versions == [4, 5, 5, 7]


def test_text_for_people_is_written_and_ignored_when_read(tmp_path):
    path = tmp_path / "deeper" / "step.jsonl"
    write_rollouts(path, [ONE], decode=lambda ids: " ".join(map(str, ids)))
    assert json.loads(path.read_text())["response"] == "3"
    assert json.loads(path.read_text())["prompt"] == "1 2"
    assert read_rollouts(path) == [ONE]
    assert [file.name for file in path.parent.iterdir()] == ["step.jsonl"]


@pytest.mark.parametrize("line", ['{"prompt_id": "1', '{"prompt_id": "1"}', "[]", '{"extra": 1}'])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "step.jsonl"
    write_rollouts(path, [ONE])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"step\.jsonl, line 2"):
        read_rollouts(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: no such"):
        read_rollouts(tmp_path / "none.jsonl")
