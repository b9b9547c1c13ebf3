"""A teacher's own layout: what fits, how many processes it makes, and what is refused in one line."""

from typing import Any

import pytest

from megatron_opd.config.checks import check_fields, check_layout
from megatron_opd.config.layout_checks import alignment_of_run, check_teacher_layout, processes_of_run
from megatron_opd.errors import UserError
from tests.config.test_checks import EXPERTS, Sizes, config


@pytest.mark.parametrize(
    ("student", "teacher", "processes", "data"),
    [
        ({"data": 2}, {"pipeline": 2}, 2, 1),
        ({"tensor": 2, "pipeline": 2}, {"tensor": 4}, 4, 1),
        ({"pipeline": 2, "data": 2}, {"tensor": 2}, 4, 2),
        ({"data": 3}, {"tensor": 2, "separate": True}, 5, 1),
        ({}, {"data": 2, "pipeline": 3, "separate": True}, 7, 2),
        ({"context": 2}, {"context": 3, "tensor": 2, "sequence_parallel": True, "separate": True}, 8, 1),
    ],
)
def test_layouts_that_fit(
    student: dict[str, Any], teacher: dict[str, Any], processes: int, data: int
) -> None:
    given = config(parallel=student, teacher={"parallel": teacher}, training={"microbatch_tokens": 1032})
    assert processes_of_run(given) == processes
    own = check_teacher_layout(given, Sizes(), processes)
    assert own is not None and own.data == data
    assert check_layout(given, Sizes(), Sizes(), processes).data == student.get("data", 1)


def test_the_teacher_need_not_divide_by_the_students_layout() -> None:
    given = config(parallel={"tensor": 4}, teacher={"parallel": {"pipeline": 4}})
    odd = Sizes(num_heads=3, num_kv_groups=3, ffn_size=65)
    check_layout(given, Sizes(), odd, 4)
    assert check_teacher_layout(given, odd, 4) is not None
    with pytest.raises(UserError, match=r"^parallel\.tensor: 4 does not divide the 3 attention heads"):
        check_layout(given, odd, Sizes(), 4)


def test_segments_suit_both_layouts() -> None:
    own = {"tensor": 4, "sequence_parallel": True, "separate": True}
    assert alignment_of_run(config(parallel={"context": 3}, teacher={"parallel": own})) == 12
    assert alignment_of_run(config(parallel={"context": 3})) == 6


MISTAKES: list[tuple[dict[str, Any], dict[str, Any], int, str]] = [
    (
        {},
        {"tensor": 3},
        3,
        r"teacher\.parallel\.tensor: 3 does not divide the 8 attention heads of the teacher",
    ),
    ({}, {"pipeline": 5}, 5, r"teacher\.parallel\.pipeline: 5 does not divide the 24 layers"),
    ({}, {"tensor": 4}, 2, r"teacher\.parallel: .* is 4, which does not divide the 2 processes"),
    ({}, {"data": 2, "tensor": 2}, 2, r"teacher\.parallel: .* is 4, but 2 processes run: start 4"),
    ({"data": 2}, {"separate": True}, 2, r"parallel: .* is 2, but 2 processes run, 1 of them .*: start 3"),
    ({"tensor": 2}, {"separate": True}, 4, r"parallel: .* is 2, which does not divide the 3 processes"),
    (
        {},
        {"separate": True, "tensor": 2},
        2,
        r"parallel: 2 processes run, 2 of them .* leaves none for the student: start 3",
    ),
    ({}, {"expert": 2}, 2, r"teacher\.parallel\.expert: 2 processes have no experts"),
    (
        {},
        {"sequence_parallel": True},
        1,
        r"teacher\.parallel\.sequence_parallel: needs teacher\.parallel\.tensor > 1",
    ),
    (
        {},
        {"virtual_pipeline": 2},
        1,
        r"teacher\.parallel\.virtual_pipeline: needs teacher\.parallel\.pipeline > 1",
    ),
    ({}, {"context": 5, "separate": True}, 6, r"training\.microbatch_tokens: 1024 cannot hold"),
]


@pytest.mark.parametrize(("student", "teacher", "processes", "words"), MISTAKES)
def test_mistakes(student: dict[str, Any], teacher: dict[str, Any], processes: int, words: str) -> None:
    given = config(parallel=student, teacher={"parallel": teacher})
    with pytest.raises(UserError, match=words) as raised:
        check_layout(given, Sizes(), Sizes(), processes)
        check_teacher_layout(given, Sizes(), processes)
    assert "\n" not in str(raised.value)


def test_experts_of_the_teacher_alone() -> None:
    given = config(parallel={"data": 2}, teacher={"parallel": {"data": 2, "expert": 2}})
    check_layout(given, Sizes(), EXPERTS, 2)
    assert check_teacher_layout(given, EXPERTS, 2) is not None


def test_servers_have_their_own_layout() -> None:
    served = {"engine": "sglang", "sglang": {"urls": ["http://h:1"]}, "parallel": {"tensor": 2}}
    with pytest.raises(UserError, match=r"teacher\.parallel: .*servers"):
        check_fields(config(teacher=served, objective={"divergence": "policy_gradient"}))
