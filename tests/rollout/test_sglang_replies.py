"""What a server may send back: only a whole, consistent reply becomes a rollout."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_opd.data.prompts import Prompt
from megatron_opd.rollout.replicas import BadReply
from megatron_opd.rollout.sampling import Sampling
from megatron_opd.rollout.sglang import reply_parser, request_body, sample_seed

PROMPT = Prompt("7@0", [4, 5, 6], "")
SAMPLING = Sampling(max_new_tokens=3, seed=1, stop_ids=(2,))
REPLY: dict[str, Any] = {
    "output_ids": [8, 9, 2],
    "meta_info": {
        "finish_reason": {"type": "stop", "matched": 2},
        "prompt_tokens": 3,
        "weight_version": "5",
        "weight_versions": [{"version": "5", "start": 0, "end": 3}],
        "output_token_logprobs": [[-1.5, 8, None], [-0.25, 9, None], [0.0, 2, None]],
    },
}


CUT = replace(SAMPLING, top_p=0.9, keep_ids=True)
CUT_META = {
    "output_token_sampling_mask": [[8, 3], [9], [4, 2, 8]],
    "output_token_sampling_logprobs": [-1.0, 0, -0.0005],
}


def parse(reply: Any, sampling: Sampling = SAMPLING) -> Any:
    return reply_parser(PROMPT, 1, sampling, 10, 5)(reply)


def test_a_good_reply_is_a_rollout() -> None:
    rollout = parse(REPLY)
    assert rollout.response_ids == [8, 9, 2] and rollout.logprobs == [-1.5, -0.25, 0.0]
    assert (rollout.prompt_id, rollout.sample, rollout.finish_reason, rollout.weight_version) == (
        "7@0",
        1,
        "stop",
        5,
    )


def meta(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda reply: reply["meta_info"].update(fields)


def ids(*tokens: Any) -> Callable[[dict[str, Any]], None]:
    return lambda reply: reply.update(output_ids=list(tokens))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda reply: reply.clear(), "no meta_info"),
        (ids(), "no output_ids"),
        (ids(8, 9, 10), "id below 10"),
        (ids(8, True, 2), "id below 10"),
        (ids(8, -1, 2), "id below 10"),
        (ids(8, 9), "2 tokens with the finish reason"),
        (ids(2, 9, 2), "3 tokens with the finish reason"),
        (ids(8, 9, 9, 2), "4 tokens with the finish reason"),
        (ids(8, 9, 3), "the log-prob of token 3"),
        (meta(finish_reason=None), "finish reason None"),
        (meta(prompt_tokens=4), "4 prompt tokens instead of 3"),
        (meta(weight_version="4"), "weights 4, 5 instead of 5"),
        (meta(weight_versions=[{"version": "4"}, {"version": "5"}]), "weights 4, 5 instead of 5"),
        (meta(output_token_logprobs=[[-1.5, 8, None]]), "1 log-probs for 3 tokens"),
        (meta(output_token_logprobs=None), "no log-probs for 3 tokens"),
        (meta(output_token_logprobs=[[-1.5, 8, None], [None, 9, None], [0.0, 2, None]]), "token 9 is"),
        (
            meta(output_token_logprobs=[[-1.5, 8, None], [float("nan"), 9, None], [0.0, 2, None]]),
            "token 9 is",
        ),
        (meta(output_token_logprobs=[[-1.5, 8, None], [0.5, 9, None], [0.0, 2, None]]), "token 9 is"),
        (meta(output_token_logprobs=[[-1.5, 8, None], [], [0.0, 2, None]]), "token 9 is"),
    ],
)
def test_anything_else_is_refused_with_the_reason(
    change: Callable[[dict[str, Any]], None], message: str
) -> None:
    reply = copy.deepcopy(REPLY)
    change(reply)
    with pytest.raises(BadReply, match=message):
        parse(reply)


def test_a_cut_is_asked_for_and_recorded() -> None:
    reply = copy.deepcopy(REPLY)
    reply["meta_info"] |= CUT_META
    rollout = parse(reply, CUT)
    assert rollout.kept_ids.lists() == [[8, 3], [9], [4, 2, 8]]
    assert rollout.logprobs == [-1.5, -0.25, 0.0] and rollout.drawn_logprobs == [-1.0, 0.0, -0.0005]
    unread = parse(reply, replace(CUT, keep_ids=False))
    assert len(unread.kept_ids) == 0 and unread.drawn_logprobs == rollout.drawn_logprobs
    uncut = parse(REPLY)
    assert len(uncut.kept_ids) == 0 and uncut.drawn_logprobs == uncut.logprobs
    body = request_body(PROMPT, 0, CUT, 10)
    assert body["return_sampling_mask"] and body["sampling_params"]["top_k"] == 10, (
        "a mask needs a finite top_k"
    )
    assert request_body(PROMPT, 0, replace(CUT, top_k=4), 10)["sampling_params"]["top_k"] == 4
    body = request_body(PROMPT, 0, SAMPLING, 10)
    assert not body["return_sampling_mask"] and body["sampling_params"]["top_k"] == -1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_token_sampling_mask": None}, "no output_token_sampling_mask, which SGLang has from 0.5.17"),
        ({"output_token_sampling_mask": [[8], [9]]}, "kept ids of 2 tokens for 3 tokens"),
        ({"output_token_sampling_mask": [[8], [9], "2"]}, "not an id below 10"),
        ({"output_token_sampling_mask": [[8], [9], None]}, "not an id below 10"),
        ({"output_token_sampling_mask": [[8], [9], [2, 3.0]]}, "not an id below 10"),
        ({"output_token_sampling_mask": [[8], [9], [2, 10]]}, "not an id below 10"),
        ({"output_token_sampling_mask": [[8], [9], [2, -1]]}, "not an id below 10"),
        ({"output_token_sampling_mask": [[8], [3, 4], [2]]}, "token 9 is not among the ids"),
        ({"output_token_sampling_mask": [[8], [], [2]]}, "token 9 is not among the ids"),
        ({"output_token_sampling_logprobs": None}, "no log-probs after the cut for 3 tokens"),
        ({"output_token_sampling_logprobs": [-1.0, 0.0]}, "2 log-probs after the cut for 3 tokens"),
        ({"output_token_sampling_logprobs": [-1.0, None, 0.0]}, "after the cut None"),
        ({"output_token_sampling_logprobs": [-1.0, float("nan"), 0.0]}, "after the cut nan"),
        ({"output_token_sampling_logprobs": [-1.6, 0.0, 0.0]}, "token 8 is -1.5, after the cut -1.6"),
        ({"output_token_sampling_logprobs": [-1.0, 0.0, 0.1]}, "after the cut 0.1"),
    ],
)
def test_a_cut_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    reply = copy.deepcopy(REPLY)
    reply["meta_info"] |= CUT_META | change
    with pytest.raises(BadReply, match=message):
        parse(reply, CUT)


@pytest.mark.parametrize("reply", [None, [], "text", {"error": {"message": "no"}}])
def test_something_else_than_a_reply_is_refused(reply: Any) -> None:
    with pytest.raises(BadReply, match="no meta_info"):
        parse(reply)


def test_without_stop_ids_a_response_runs_to_its_end() -> None:
    sampling = Sampling(max_new_tokens=3, seed=1)
    assert request_body(PROMPT, 0, sampling, 10)["sampling_params"]["ignore_eos"] is True
    reply = copy.deepcopy(REPLY)
    reply["meta_info"]["finish_reason"] = {"type": "length", "length": 3}
    assert reply_parser(PROMPT, 0, sampling, 10, 5)(reply).finish_reason == "length"


def test_every_response_has_a_seed_of_its_own() -> None:
    seeds = {sample_seed(seed, name, sample) for seed in (0, 1) for name in ("a", "b") for sample in (0, 1)}
    assert len(seeds) == 8 and all(0 <= seed < 2**63 for seed in seeds)
