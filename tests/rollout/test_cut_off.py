"""Responses cut off by a change of weights: the parts, what may not be part of them, and the whole."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_opd.data.rollouts import Rollout
from megatron_opd.objectives.kept_ids import KeptIds
from megatron_opd.rollout.cut_off import joined, weight_spans
from megatron_opd.rollout.replicas import ANY_WEIGHTS, BadReply, Interrupted, Request, Wanted
from megatron_opd.rollout.sglang import response_request
from tests.rollout.test_sglang_replies import PROMPT, SAMPLING

LONG = replace(SAMPLING, max_new_tokens=6)  # 2 stops
ABORT = {"type": "abort", "message": "Aborted", "status_code": None}


def reply(ids: list[int], versions: list[tuple[int, int]], kind: str = "abort", told: int = 3) -> Any:
    """Of a server: `ids` after `told` tokens, drawn by weights of [(first token, version), ...]."""
    ends = [first for first, _ in versions[1:]] + [len(ids)]
    spans = [
        {"version": str(version), "start": first, "end": end}
        for (first, version), end in zip(versions, ends, strict=True)
    ]
    meta = {
        "finish_reason": ABORT if kind == "abort" else {"type": kind},
        "prompt_tokens": told,
        "weight_version": spans[-1]["version"] if spans else "0",
        "weight_versions": spans,
        "output_token_logprobs": [[-float(token), token, None] for token in ids],
    }
    return {"output_ids": ids, "meta_info": meta}


def first_request(oldest: int = 4) -> Request[Rollout]:
    return response_request(PROMPT, 1, LONG, 10, oldest, later=True)


def rest(request: Request[Rollout], answer: Any) -> Request[Rollout]:
    with pytest.raises(Interrupted) as caught:
        request[1](answer)
    assert caught.value.further == bool(answer["output_ids"])
    assert (
        caught.value.request[0]["sampling_params"]["sampling_seed"]
        == request[0]["sampling_params"]["sampling_seed"]
    )
    return caught.value.request


def test_three_parts_are_one_response() -> None:
    second = rest(first_request(), reply([8, 9], [(0, 4), (1, 5)]))
    assert second[0]["input_ids"] == [4, 5, 6, 8, 9]
    assert second[0]["sampling_params"]["max_new_tokens"] == 4
    third = rest(second, reply([7], [(0, 5)], told=5))
    whole = third[1](reply([3, 2], [(0, 6), (1, 7)], "stop", told=6))
    assert whole == Rollout(
        PROMPT.id,
        1,
        [4, 5, 6],
        [8, 9, 7, 3, 2],
        [-8.0, -9.0, -7.0, -3.0, -2.0],
        "stop",
        4,
        [[1, 5], [3, 6], [4, 7]],
    )
    assert whole.token_versions == [4, 5, 5, 6, 7]


def test_cut_off_before_the_first_token_it_is_asked_for_again() -> None:
    request = first_request()
    waiting = {"output_ids": [], "meta_info": {"finish_reason": ABORT, "weight_version": "3"}}
    again = rest(request, waiting)
    assert again[0] == request[0]
    second = rest(again, reply([8], [(0, 6)]))
    once_more = rest(second, waiting)
    assert once_more[0] == second[0]
    whole = once_more[1](reply([2], [(0, 6)], "stop", told=4))
    assert whole.response_ids == [8, 2] and whole.weight_version == 6 and whole.version_changes == []


def test_by_the_same_weights_where_these_do_not_change() -> None:
    begin = response_request(PROMPT, 1, LONG, 10, 4, later=False)
    second = rest(begin, reply([8, 9], [(0, 4)]))
    whole = second[1](reply([2], [(0, 4)], "stop", told=5))
    assert (whole.response_ids, whole.finish_reason, whole.token_versions) == ([8, 9, 2], "stop", [4, 4, 4])
    for request in (begin, second):
        with pytest.raises(BadReply, match=r"weights (4, )?5 instead of 4"):
            request[1](reply([8, 9], [(0, 5)], told=len(request[0]["input_ids"])))


@pytest.mark.parametrize(("ids", "reason"), [([8, 2], "stop"), ([8, 9, 8, 9, 8, 9], "length")])
def test_cut_off_when_it_was_complete_it_is_whole(ids: list[int], reason: str) -> None:
    assert first_request()[1](reply(ids, [(0, 4)])).finish_reason == reason


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (reply([8, 9], [(0, 3)]), r"weights \[3\] instead of 4 and newer ones"),
        (reply([8, 9], [(0, 5), (1, 4)]), r"weights \[5, 4\] instead of 4"),
        (reply([8, 2, 9], [(0, 4)]), "3 tokens with the finish reason"),
        (reply([8, 9, 7, 8, 9, 7, 8], [(0, 4)]), "7 tokens with the finish reason"),
        (reply([8], [(0, 4)], "stop"), "1 tokens with the finish reason"),
        (reply([8], [(0, 4)], told=4), "4 prompt tokens instead of 3"),
        (reply([], [(0, 4)], "length"), "no output_ids"),
    ],
)
def test_what_is_no_beginning_of_the_response_is_refused(answer: Any, message: str) -> None:
    with pytest.raises(BadReply, match=message):
        first_request()[1](answer)


def test_the_rest_is_not_drawn_by_older_weights_than_the_beginning() -> None:
    with pytest.raises(Interrupted) as caught:
        first_request()[1](reply([8, 9], [(0, 4), (1, 6)]))
    assert caught.value.version == "6"
    with pytest.raises(BadReply, match="instead of 6"):
        caught.value.request[1](reply([2], [(0, 5)], "stop", told=5))


def spans(*rows: Any) -> Callable[[dict[str, Any]], None]:
    return lambda meta: meta.update(weight_versions=list(rows))


@pytest.mark.parametrize(
    "change",
    [
        spans({"version": "4"}),
        spans({"version": "4", "start": 1, "end": 3}),
        spans({"version": "4", "start": 0}, {"version": "5", "start": 0}),
        spans({"version": "4", "start": 0}, {"version": "5", "start": 3}),
        spans({"version": "default", "start": 0}),
        spans({"version": "4", "start": 0}, {"version": "5, incomplete", "start": 2}),
        spans("4"),
        lambda meta: meta.update(weight_versions=None, weight_version=None),
    ],
)
def test_spans_that_say_nothing_are_refused(change: Callable[[dict[str, Any]], None]) -> None:
    meta = copy.deepcopy(reply([7, 8, 9], [(0, 4)])["meta_info"])
    assert weight_spans(meta, 3, 4) == [[0, 4]]
    change(meta)
    with pytest.raises(BadReply, match="the weights that drew"):
        weight_spans(meta, 3, 4)


def test_a_server_without_spans_has_drawn_all_with_one_version() -> None:
    assert weight_spans({"weight_version": "5"}, 3, 4) == [[0, 5]]


def test_nothing_more_changes_nothing() -> None:
    first = Rollout("0", 0, [1], [2], [-1.0], "abort", 3)
    assert joined(first, replace(first, response_ids=[], logprobs=[], weight_version=9)) == first


def test_what_a_cut_left_of_both_parts() -> None:
    first = Rollout("0", 0, [1], [2], [-1.0], "abort", 3, [], [-0.5], KeptIds.of([[2, 7]]))
    rest = Rollout(
        "0", 0, [1, 2], [8, 9], [-2.0, -3.0], "length", 3, [], [0.0, -0.25], KeptIds.of([[8], [9, 2]])
    )
    whole = joined(first, rest)
    assert whole.drawn_logprobs == [-0.5, 0.0, -0.25] and whole.kept_ids.lists() == [[2, 7], [8], [9, 2]]
    plain = [replace(each, drawn_logprobs=[], kept_ids=KeptIds.of()) for each in (first, rest)]
    assert joined(*plain).drawn_logprobs == [-1.0, -2.0, -3.0] and len(joined(*plain).kept_ids) == 0


def test_the_rest_is_asked_for_with_what_the_cut_keeps() -> None:
    sampling = replace(LONG, top_p=0.9, keep_ids=True)
    begin = response_request(PROMPT, 1, sampling, 10, 4, later=True)
    answer = reply([8], [(0, 4)])
    answer["meta_info"] |= {"output_token_sampling_mask": [[8, 3]], "output_token_sampling_logprobs": [-7.5]}
    second = rest(begin, answer)
    assert second[0]["return_sampling_mask"] and second[0]["sampling_params"]["top_k"] == 10
    end = reply([2], [(0, 5)], "stop", told=4)
    with pytest.raises(BadReply, match="output_token_sampling_mask"):
        second[1](end)
    end["meta_info"] |= {"output_token_sampling_mask": [[2]], "output_token_sampling_logprobs": [0.0]}
    whole = second[1](end)
    assert whole.drawn_logprobs == [-7.5, 0.0] and whole.kept_ids.lists() == [[8, 3], [2]]


@pytest.mark.parametrize(
    ("wanted", "suiting", "other"),
    [
        (Wanted("7"), ["7"], ["6", "8", "7, incomplete", "default", None]),
        (
            Wanted("7", or_newer=True),
            ["7", "8", "10"],
            ["6", "7, incomplete", "8, incomplete", "default", None],
        ),
        (Wanted(ANY_WEIGHTS), ["7", "default", None], []),
    ],
)
def test_weights_that_may_answer(wanted: Wanted, suiting: list[Any], other: list[Any]) -> None:
    assert all(wanted.suits(found) for found in suiting)
    assert not any(wanted.suits(found) for found in other)
