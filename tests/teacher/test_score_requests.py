"""What an SGLang server is asked about a microbatch, and which of its replies are believed."""

import base64
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from megatron_opd.rollout.replicas import BadReply
from megatron_opd.teacher.score_requests import Span, cut_to_limit, parse_score, score_body, spans_of

VOCAB = 10
SPAN = Span(np.array([4, 5, 9, 7, 6]), np.array([1, 3]))  # the target of position 2 does not enter the loss


def entry(logprob: Any, token: int) -> list[Any]:
    return [logprob, token, None]


def reply(**meta: Any) -> dict[str, Any]:
    tokens = [entry(None, 5), entry(-1.5, 0), entry(-0.5, 7), entry(-2.5, 6)]  # 0 stands for the last id, 9
    nested = [None, *([entry(-0.5, row), entry(-1.0, 8)] for row in range(3))]
    return {
        "meta_info": {
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": 5,
            "input_token_logprobs": tokens,
            "input_top_logprobs": nested,
            **meta,
        }
    }


def flat(values: Any, ids: Any, **others: Any) -> dict[str, Any]:
    """The same in arrays."""
    return {
        "input_top_logprobs_val_flat_b64": base64.b64encode(np.asarray(values, "<f4").tobytes()).decode(),
        "input_top_logprobs_idx_flat_b64": base64.b64encode(np.asarray(ids, "<i4").tobytes()).decode(),
        "input_top_logprobs_val_flat_b64_dtype": "float32",
        "input_top_logprobs_idx_flat_b64_dtype": "int32",
        "input_top_logprobs_shape": [3, 2],
        "input_top_logprobs_null_prefix": 1,
        **others,
    }


FLAT = flat([[-0.5, -1.0]] * 3, [[0, 8], [1, 8], [2, 8]])


@pytest.mark.parametrize("arrays", [{}, FLAT])
def test_a_good_reply_is_read_at_the_loss_positions(arrays: dict[str, Any]) -> None:
    scored = parse_score(reply(**arrays), SPAN, 2, None, VOCAB)
    assert scored.logprob.tolist() == [-1.5, -2.5]
    assert scored.ids.tolist() == [[0, 8], [2, 8]]
    assert scored.ids_logprob.tolist() == [[-0.5, -1.0]] * 2


def test_named_ids_are_gathered_for_each_position() -> None:
    wanted = np.array([[3, 1], [1, 8]])
    assert score_body(SPAN, 0, wanted)["token_ids_logprob"] == [1, 3, 8]
    rows: list[Any] = [
        None,
        *([entry(-2 - row - token / 10, token) for token in (1, 3, 8)] for row in range(3)),
    ]
    scored = parse_score(reply(input_token_ids_logprobs=rows), SPAN, 0, wanted, VOCAB)
    assert scored.ids_logprob == pytest.approx(np.array([[-2.3, -2.1], [-4.1, -4.8]]))
    rows[1][0] = entry(-0.1, 2)
    with pytest.raises(BadReply, match="other ids than those asked for"):
        parse_score(reply(input_token_ids_logprobs=rows), SPAN, 0, wanted, VOCAB)


def meta(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda reply: reply["meta_info"].update(fields)


def replaced(key: str, index: int, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda reply: reply["meta_info"][key].__setitem__(index, value)


TOKENS, TOP = "input_token_logprobs", "input_top_logprobs"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda reply: reply.clear(), "no meta_info"),
        (meta(finish_reason={"type": "abort", "message": "too long"}), "aborted the request: too long"),
        (meta(prompt_tokens=4), "4 prompt tokens instead of 5"),
        (meta(input_token_logprobs=None), "no log-probs for 4 tokens"),
        (lambda reply: reply["meta_info"][TOKENS].pop(), "3 log-probs for 4 tokens"),
        (replaced(TOKENS, 2, entry(-0.5, 8)), "log-prob of the id 8 in the place of 7"),
        (replaced(TOKENS, 3, entry(-0.5, 0)), "log-prob of the id 0 in the place of 6"),
        (replaced(TOKENS, 2, entry(None, 7)), "log-prob of a token is nan"),
        (replaced(TOKENS, 2, entry(0.5, 7)), "log-prob of a token is 0.5"),
        (replaced(TOKENS, 2, entry(float("-inf"), 7)), "log-prob of a token is -inf"),
        (replaced(TOKENS, 2, []), r"not \[log-prob, id\] each"),
        (replaced(TOKENS, 2, "text"), r"not \[log-prob, id\] each"),
        (meta(input_top_logprobs=None), "no rows of log-probs of ids for 3 tokens"),
        (lambda reply: reply["meta_info"][TOP].pop(), "2 rows of log-probs of ids for 3 tokens"),
        (replaced(TOP, 1, [entry(-0.5, 0)]), "a row of log-probs of ids has not 2"),
        (replaced(TOP, 1, None), "a row of log-probs of ids has not 2"),
        (replaced(TOP, 1, [entry(-0.5, 3), entry(-1.0, 3)]), "twice among the likeliest"),
        (replaced(TOP, 1, [entry(-0.5, 10), entry(-1.0, 3)]), "not an id below 10"),
        (replaced(TOP, 1, [entry(-0.5, -1), entry(-1.0, 3)]), "not an id below 10"),
        (replaced(TOP, 1, [entry(-0.1, 2), entry(-0.1, 3)]), "sum to more than 1"),
        (replaced(TOP, 1, [entry(None, 2), entry(-0.1, 3)]), "log-prob of an id of the support is nan"),
        (meta(**flat([[-0.5] * 2] * 2, [[0, 1]] * 2, input_top_logprobs_shape=[2, 2])), r"shape \[2, 2\]"),
        (meta(**FLAT | {"input_top_logprobs_null_prefix": 0}), "after 0, not"),
        (meta(**FLAT | {"input_top_logprobs_val_flat_b64": "%"}), "cannot be read"),
        (meta(**FLAT | {"input_top_logprobs_val_flat_b64": "AAAA"}), "cannot be read"),
        (meta(**FLAT | {"input_top_logprobs_idx_flat_b64_dtype": "int7"}), "cannot be read"),
        (meta(**flat([[-0.5, float("nan")]] * 3, [[0, 1]] * 3)), "log-prob of an id of the support is nan"),
    ],
)
def test_anything_else_is_refused_with_the_reason(
    change: Callable[[dict[str, Any]], None], message: str
) -> None:
    changed = copy.deepcopy(reply())
    change(changed)
    with pytest.raises(BadReply, match=message):
        parse_score(changed, SPAN, 2, None, VOCAB)


@pytest.mark.parametrize("limit", [100, 3, 1])
def test_spans_hold_every_loss_position_once_and_end_with_its_target(limit: int) -> None:
    tokens_T, targets_T = torch.arange(10, 22), torch.arange(11, 23)
    mask_T = torch.tensor([0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1]).bool()
    offsets = torch.tensor([0, 6, 8, 12], dtype=torch.int32)
    spans = list(spans_of(tokens_T, targets_T, mask_T, offsets, limit))
    scored = [int(span.tokens[position + 1]) for span in spans for position in span.positions]
    assert scored == targets_T[mask_T].tolist()
    for span in spans:
        assert span.positions[-1] - span.positions[0] < limit
        assert len(span.tokens) == span.positions[-1] + 2, "nothing behind the last scored token"
        assert span.tokens[0] in (10, 18), (
            "from the start of its sequence; the second one has no loss position"
        )
    assert len(spans) == {100: 2, 3: 4, 1: 6}[limit]


def test_a_request_that_names_ids_has_a_bounded_reply() -> None:
    generator = np.random.default_rng(0)
    span = Span(np.arange(41), np.arange(0, 40, 2))
    wanted = generator.integers(0, 1000, (20, 8))
    parts = list(cut_to_limit(span, wanted, limit=200))
    assert np.concatenate([part.positions for part, _ in parts]).tolist() == span.positions.tolist()
    assert np.concatenate([ids for _, ids in parts]).tolist() == wanted.tolist()
    assert 1 < len(parts) < 20
    for part, ids in parts:
        assert (part.positions[-1] - part.positions[0] + 1) * len(np.unique(ids)) <= 200
        assert part.tokens.tolist() == list(range(part.positions[-1] + 2))
    assert len(list(cut_to_limit(span, np.zeros((20, 8), int), limit=200))) == 1, (
        "what is alike stays together"
    )
    assert len(list(cut_to_limit(span, wanted, limit=1))) == 20, "a position is never cut"
