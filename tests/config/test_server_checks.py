"""teacher.engine: only keys that the engine reads, and only what servers can score."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from megatron_opd.config.checks import check_fields, check_layout
from megatron_opd.errors import UserError
from tests.config.test_checks import Sizes, config

SERVED: dict[str, Any] = {"engine": "sglang", "sglang": {"urls": ["http://a:1"]}, "path": "t"}


@dataclass(frozen=True)
class Served:
    """Any architecture: it is not laid out here."""

    vocab_size: int = 1000
    max_positions: int = 4096


def test_rollouts_and_teacher_have_servers_of_their_own() -> None:
    started = {"python": "/venv/bin/python", "servers": 2}
    check_fields(
        config(
            rollout={"engine": "sglang", "sglang": {"python": "/venv/bin/python"}},
            teacher={**SERVED, "sglang": started, "request_tokens": 512},
        )
    )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"teacher": {"request_tokens": 9}}, "teacher.request_tokens: the engine megatron does not read it"),
        ({"teacher": {"sglang": {"servers": 2}}}, "teacher.sglang: the engine megatron does not read it"),
        ({"teacher": {**SERVED, "sglang": {}}}, "teacher.sglang: give either python"),
        (
            {"teacher": {**SERVED, "sglang": {"urls": ["http://a:1"], "servers": 2}}},
            "teacher.sglang.servers: of servers that the run starts",
        ),
        (
            {"teacher": {**SERVED, "sglang": {"urls": ["http://a:1"], "gpus": [2]}}},
            "teacher.sglang.gpus: of servers that the run starts",
        ),
        (
            {"teacher": {**SERVED, "sglang": {"python": "p", "servers": 2, "gpus": [4, 5, 6]}}},
            "teacher.sglang.gpus: .* 3 for 2 servers do not go",
        ),
        (
            {"teacher": {**SERVED, "sglang": {"python": "p", "servers": 2, "gpus": [4, 4]}}},
            "teacher.sglang.gpus: .* each GPU once: 1 for 2 servers",
        ),
        (
            {"teacher": {**SERVED, "sglang": {"python": "p", "arguments": ["--port=3"]}}},
            "teacher.sglang.arguments: --port is set by the run",
        ),
        ({"teacher": {**SERVED, "offload": True}}, "teacher.offload: with teacher.engine sglang"),
        (
            {"teacher": {**SERVED, "payload": "sampled"}},
            "teacher.payload: servers give what the objective reads",
        ),
        (
            {"teacher": {"payload": "topk"}},
            "teacher.payload: nothing reads the ids of topk while objective.support",
        ),
        (
            {"teacher": {"payload": "sampled"}, "objective": {"support": "teacher_topk"}},
            "teacher.payload: sampled has no ids, .* set it to topk or hidden_states",
        ),
        (
            {"teacher": {"payload": "topk"}, "objective": {"support": "student_topk"}},
            "teacher.payload: topk has no log-probs of the student's likeliest ids, .* set it to hidden_states",
        ),
        (
            {"teacher": {"payload": "sampled"}, "objective": {"support": "student_topk_sampled"}},
            "teacher.payload: sampled has no log-probs of the student's likeliest ids",
        ),
        (
            {"teacher": SERVED, "rollout": {"temperature": 0.7}, "evaluation": {"prompts": "h"}},
            "evaluation.prompts: servers score at temperature 1, .* drawn at 0.7",
        ),
        (
            {
                "teacher": SERVED,
                "objective": {"support": "student_topk"},
                "training": {"updates_per_rollout": 2},
            },
            "training.updates_per_rollout: servers score the student's likeliest ids before the first",
        ),
    ],
)
def test_keys_that_do_not_go_together(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_fields(config(**sections))


def test_a_served_teacher_has_to_fit_the_sequences_but_not_the_layout() -> None:
    layout = {"parallel": {"tensor": 4}}
    check_layout(config(teacher=SERVED, **layout), Sizes(), None, 4, served=Served())
    for served, message in (
        (Served(max_positions=1000), "rollout.max_new_tokens: .* the teacher has 1000 positions"),
        (Served(vocab_size=20), "objective.k: 32 is more than the teacher's vocabulary of 20"),
    ):
        topk = config(teacher=SERVED, objective={"support": "teacher_topk"}, **layout)
        with pytest.raises(UserError, match=message):
            check_layout(topk, Sizes(), None, 4, served=served)


def test_a_served_teacher_with_fewer_tokens_needs_the_local_engine() -> None:
    drawn = {"engine": "sglang", "sglang": {"python": "p"}}
    with pytest.raises(UserError, match=r"rollout.engine: SGLang draws from all 1000 tokens"):
        check_layout(
            config(teacher=SERVED, rollout=drawn), Sizes(), None, 1, served=replace(Served(), vocab_size=900)
        )
