"""Routed prompts: each line's teacher, and microbatches that hold one teacher's rollouts."""

from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.data.packing import count_loss_tokens, count_tokens, pack, response_starts
from megatron_opd.data.prompts import LoadedPrompts
from megatron_opd.data.rollouts import Rollout
from megatron_opd.data.routes import check_all_teach, pack_by_route, routed, routes_digest
from megatron_opd.errors import UserError
from tests.data.test_prompts import load, write

NAMES = ["math", "code"]
ROWS = [
    {"prompt": "one two", "domain": "math"},
    {"prompt": "one " * 60, "domain": "code"},  # too long
    {"prompt": "three", "domain": "code"},
]


def routed_rows(folder: Path, rows: list[dict[str, str]]) -> LoadedPrompts:
    path = write(folder / "prompts.jsonl", rows)
    return routed(load(path), path, "domain", NAMES)


def test_every_prompt_has_the_teacher_of_its_line(tmp_path: Path) -> None:
    prompts = routed_rows(tmp_path, ROWS).prompts
    assert [(prompt.id, prompt.route) for prompt in prompts] == [("0", "math"), ("2", "code")]
    check_all_teach(prompts, NAMES)
    swapped = routed_rows(tmp_path, [{**ROWS[0], "domain": "code"}, {**ROWS[2], "domain": "math"}]).prompts
    assert routes_digest(swapped) != routes_digest(prompts)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "two", "domain": "art"}, r"line 4: domain 'art' is no teacher .*: use one of math, code"),
        ({"prompt": "two"}, r"line 4: no field 'domain' \(there are: prompt\); set teacher\.route_field"),
    ],
)
def test_a_line_without_a_teacher_is_named(tmp_path: Path, row: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        routed_rows(tmp_path, [*ROWS, row])


def test_a_teacher_that_no_prompt_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^teacher\.paths\.code: no prompt .*: remove it$"):
        check_all_teach(routed_rows(tmp_path, ROWS[:2]).prompts, NAMES)


@st.composite
def rollout_lists(draw: st.DrawFn) -> list[Rollout]:
    shapes = draw(
        st.lists(st.tuples(st.integers(1, 16), st.integers(0, 24), st.sampled_from("abc")), max_size=16)
    )
    return [
        Rollout(str(i), 0, [i + 1] * p, [i + 1] * r, [-1.0] * r, "length", 0, route=route)
        for i, (p, r, route) in enumerate(shapes)
    ]


@given(rollout_lists(), st.integers(1, 4), st.sampled_from([1, 2]))
def test_microbatches_hold_one_teachers_rollouts(rollouts: list[Rollout], ranks: int, multiple: int) -> None:
    pack_one = partial(pack, dp_size=ranks, token_budget=48, count_multiple=multiple)
    packed, routes = pack_by_route(rollouts, pack_one)
    assert [len(rank) for rank in packed] == [len(routes)] * ranks
    expected = [rollout for rollout in rollouts if rollout.response_ids]
    assert loss_positions_of(packed) == loss_positions_of(pack_one(expected))
    starts = response_starts(rollouts)
    for microbatch in (microbatch for rank in packed for microbatch in rank):
        for t in microbatch.mask_T.nonzero()[:, 0].tolist():
            index, place = int(microbatch.targets_T[t]) - 1, int(microbatch.place_T[t])
            assert microbatch.number_T[t] == starts[index] + place, "its number in the whole list"
            assert microbatch.length_T[t] == len(rollouts[index].response_ids) > place
    for route in set(routes):
        numbers = [i for i, name in enumerate(routes) if name == route]
        assert len(numbers) % multiple == 0
        found = {int(token) for rank in packed for i in numbers for token in rank[i].tokens_T[rank[i].mask_T]}
        assert found == {
            i + 1 for i, each in enumerate(rollouts) if each.route == route and each.response_ids
        }


def loss_positions_of(packed: list) -> int:
    return sum(count_loss_tokens(rank) for rank in packed)


def test_teachers_with_one_rollout_each_do_not_meet_on_one_rank() -> None:
    rollouts = [Rollout(route, 0, [1, 2], [3, 4], [-1.0, -1.0], "length", 0, route=route) for route in "abcd"]
    packed, routes = pack_by_route(rollouts, partial(pack, dp_size=2, token_budget=48))
    assert routes == list("abcd") and [count_tokens(rank) for rank in packed] == [6, 6]
