"""rollout.engine: only keys that the engine reads, and only what SGLang can draw."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_opd.config.checks import check_fields, check_layout
from megatron_opd.errors import UserError
from tests.config.test_checks import Sizes, config

SERVED = {"engine": "sglang", "sglang": {"python": "/venv/bin/python"}}


@pytest.mark.parametrize(
    "rollout",
    [
        SERVED,
        {"engine": "sglang", "sglang": {"urls": ["http://a:1", "https://b:2"], "concurrency": 8}},
        {**SERVED, "temperature": 0.6, "top_k": 20},
        {**SERVED, "top_k": 1},
        {**SERVED, "weight_sync": "tensor"},
        {
            "engine": "sglang",
            "sglang": {"urls": ["http://[::1]:1", "http://localhost:2"]},
            "weight_sync": "tensor",
        },
        {"engine": "sglang", "sglang": {"urls": ["http://a:1"]}, "weight_sync": "distributed"},
        {**SERVED, "max_staleness": 2},
        {**SERVED, "sglang": {"python": "p", "arguments": ["--tp-size", "2"], "servers": 2, "host": "::"}},
    ],
)
def test_engines_that_fit(rollout: dict[str, Any]) -> None:
    check_fields(config(rollout=rollout))


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"sglang": {"servers": 2}}, "rollout.sglang: the engine local reads nothing of it"),
        ({"max_staleness": 1}, "rollout.max_staleness: the engine local draws with the student itself"),
        ({"engine": "sglang"}, "give either python"),
        ({"weight_sync": "tensor"}, "rollout.weight_sync: the engine local has the student's weights anyway"),
        (
            {
                "engine": "sglang",
                "sglang": {"urls": ["http://127.0.0.1:1", "http://a:1"]},
                "weight_sync": "tensor",
            },
            "rollout.weight_sync: tensor is for servers on this machine, unlike http://a:1",
        ),
        ({"engine": "sglang", "sglang": {"python": "p", "urls": ["http://a:1"]}}, "give either python"),
        ({"engine": "sglang", "sglang": {"servers": 2, "urls": ["http://a:1"]}}, "rollout.sglang.servers: "),
        ({**SERVED, "max_batch": 3}, "rollout.max_batch: the engine local reads it"),
        ({**SERVED, "temperature": 0.5, "top_k": 1}, "rollout.temperature: SGLang takes the likeliest"),
        ({**SERVED, "sglang": {"python": "p", "arguments": ["--port=3"]}}, "--port is set by the run"),
        (
            {**SERVED, "sglang": {"python": "p", "arguments": ["--sampling-mask-max-tokens", "9"]}},
            "--sampling-mask-max-tokens is set by the run",
        ),
    ],
)
def test_keys_that_do_not_go_together(rollout: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_fields(config(rollout=rollout))


def test_a_smaller_vocabulary_of_another_model_needs_the_local_engine() -> None:
    small = replace(Sizes(), vocab_size=900)
    with pytest.raises(UserError, match=r"rollout.engine: SGLang draws from all 1000 tokens"):
        check_layout(config(rollout=SERVED), Sizes(), small, 1)
    check_layout(config(rollout=SERVED), small, Sizes(), 1)
