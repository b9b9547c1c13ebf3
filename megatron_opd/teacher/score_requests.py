"""What an SGLang server is asked about a sequence, and what its reply says once it is checked.

A request has some consecutive positions of one sequence scored: /generate with no token to draw, log-probs from the
first of them on, and the sequence cut behind the last. Nothing that comes back is believed before it is checked.

Shapes: T positions of a microbatch, R positions that a request is about, L of them that enter the loss, K ids of the
support, U ids that a request names.
"""

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megatron_opd.rollout.replicas import BadReply

Ids = NDArray[np.int64]
Logprobs = NDArray[np.float32]
ABOVE_ZERO = 1e-3  # of a log-prob, by rounding
NAMED_LIMIT = 2**14  # log-probs of named ids in a reply: a server gives every id at every position


@dataclass(frozen=True)
class Span:
    """Positions of a sequence that one request has scored: `positions` [L] ascending, each predicts the next token."""

    tokens: Ids  # the sequence up to the token that the last position predicts
    positions: Ids

    @property
    def first(self) -> int:
        """The position that log-probs are asked from."""
        return int(self.positions[0])


@dataclass(frozen=True)
class Scored:
    """Log-probs in nats, at temperature 1: of the next tokens [L] and, if asked for, of K ids each [L, K]."""

    logprob: Logprobs
    ids: Ids
    ids_logprob: Logprobs


def spans_of(
    tokens_T: Tensor, targets_T: Tensor, mask_T: Tensor, cu_seqlens: Tensor, limit: int
) -> Iterator[Span]:
    """The spans of a whole microbatch, in the order of its loss positions; each is of `limit` positions at most."""
    tokens, targets, mask = (tensor.cpu().numpy() for tensor in (tokens_T, targets_T, mask_T))
    offsets = cu_seqlens.tolist()
    for start, end in pairwise(offsets):
        left = np.flatnonzero(mask[start:end])
        while left.size:
            positions, left = np.split(left, [int(np.searchsorted(left, left[0] + limit))])
            last = start + int(positions[-1])
            sequence = np.append(tokens[start : last + 1], targets[last])
            yield Span(sequence, positions)


def cut_to_limit(span: Span, wanted: Ids, limit: int = NAMED_LIMIT) -> Iterator[tuple[Span, Ids]]:
    """Parts of a span with the ids [L, K] that each position wants: a reply has `limit` log-probs of ids at most.

    A server gives every id that a request names at every position, so short parts of similar positions are cheap.
    """
    start = 0
    while start < len(span.positions):
        named: set[int] = set()
        end = start
        while end < len(span.positions):
            named.update(wanted[end].tolist())
            covered = int(span.positions[end] - span.positions[start]) + 1
            if end > start and covered * len(named) > limit:
                break
            end += 1
        positions = span.positions[start:end]
        yield Span(span.tokens[: int(positions[-1]) + 2], positions), wanted[start:end]
        start = end


def score_body(span: Span, k: int, wanted: Ids | None = None) -> dict[str, Any]:
    """What /generate is sent: for log-probs of the next tokens, of the `k` likeliest ids, or of the ids `wanted`."""
    body: dict[str, Any] = {
        "input_ids": span.tokens.tolist(),
        "return_logprob": True,
        "logprob_start_len": span.first,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
    }
    if k > 0:
        # Servers that do not know the flat form ignore these two, and answer in nested lists.
        flat = {"return_flat_raw_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True}
        body |= {"top_logprobs_num": k, **flat}
    if wanted is not None:
        body["token_ids_logprob"] = np.unique(wanted).tolist()
    return body


def parse_score(reply: Any, span: Span, k: int, wanted: Ids | None, vocab_size: int) -> Scored:
    """The reply to `score_body`; `wanted` [L, K] are the ids that each position has log-probs of.

    `vocab_size` is that of the server's model. Raises BadReply for anything but a whole, consistent reply.
    """
    meta = reply.get("meta_info") if isinstance(reply, dict) else None
    if not isinstance(meta, dict):
        raise BadReply("the reply has no meta_info")
    reason = meta.get("finish_reason")
    if isinstance(reason, dict) and reason.get("type") == "abort":
        raise BadReply(f"the server aborted the request: {reason.get('message')}")
    if meta.get("prompt_tokens") != len(span.tokens):
        raise BadReply(f"{meta.get('prompt_tokens')} prompt tokens instead of {len(span.tokens)}")
    count, chosen = len(span.tokens) - 1 - span.first, span.positions - span.first
    logprob = _next_tokens(meta.get("input_token_logprobs"), span, vocab_size)[chosen]
    ids: Ids = np.empty((len(chosen), 0), np.int64)
    ids_logprob: Logprobs = np.empty((len(chosen), 0), np.float32)
    if k > 0:
        ids, ids_logprob = _likeliest(meta, count, k)
        ids, ids_logprob = ids[chosen], ids_logprob[chosen]
        _check_ids(ids, vocab_size)
    elif wanted is not None:
        ids, ids_logprob = wanted, _named(meta.get("input_token_ids_logprobs"), count, chosen, wanted)
    _check_logprobs(ids_logprob, "an id of the support")
    if ids.size and (np.exp(ids_logprob.astype(np.float64)).sum(1) > 1 + 1e-2).any():
        raise BadReply("the probabilities of a position's ids sum to more than 1")
    return Scored(logprob, ids, ids_logprob)


def _next_tokens(entries: Any, span: Span, vocab_size: int) -> Logprobs:
    """[R] from [log-prob, id, text] of every token from the first position on; that one's own log-prob is null."""
    expected = span.tokens[span.first :]
    if not isinstance(entries, list) or len(entries) != len(expected):
        count = len(entries) if isinstance(entries, list) else "no"
        raise BadReply(f"{count} log-probs for {len(expected)} tokens")
    values, ids = _columns(entries[1:], "the log-probs of the tokens")
    # SGLang says 0 for the last id of the vocabulary; the log-prob is the right one.
    differ = (ids != expected[1:]) & ~((expected[1:] == vocab_size - 1) & (ids == 0))
    if differ.any():
        where = int(differ.argmax())
        raise BadReply(f"a log-prob of the id {ids[where]} in the place of {expected[1 + where]}")
    _check_logprobs(values, "a token")
    return values


def _columns(entries: list[Any], what: str) -> tuple[Logprobs, Ids]:
    """Log-probs and ids of a list of [log-prob, id, text]."""
    try:
        values = np.array([entry[0] for entry in entries], dtype=np.float32)
        ids = np.array([entry[1] for entry in entries], dtype=np.int64)
    except (TypeError, ValueError, IndexError, KeyError, OverflowError):
        raise BadReply(f"{what} are not [log-prob, id] each") from None
    return values, ids


def _likeliest(meta: dict[str, Any], count: int, k: int) -> tuple[Ids, Logprobs]:
    """Ids and log-probs [R, K] of the likeliest ids, from arrays in base64 or from nested lists."""
    if "input_top_logprobs_val_flat_b64" not in meta:
        rows = _rows(meta.get("input_top_logprobs"), count, k)
        values, ids = _columns([entry for row in rows for entry in row], "the log-probs of the likeliest ids")
        return ids.reshape(count, k), values.reshape(count, k)
    shape, prefix = meta.get("input_top_logprobs_shape"), meta.get("input_top_logprobs_null_prefix")
    if shape != [count, k] or prefix != 1:
        raise BadReply(
            f"log-probs of the likeliest ids of shape {shape} after {prefix}, not {[count, k]} after 1"
        )
    try:
        values, ids = (
            np.frombuffer(
                base64.b64decode(meta[f"input_top_logprobs_{name}_flat_b64"], validate=True),
                np.dtype(meta[f"input_top_logprobs_{name}_flat_b64_dtype"]).newbyteorder("<"),
            ).reshape(count, k)
            for name in ("val", "idx")
        )
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise BadReply(f"the log-probs of the likeliest ids cannot be read: {error}") from None
    return ids.astype(np.int64), values.astype(np.float32)


def _rows(rows: Any, count: int, width: int) -> list[list[Any]]:
    """Nested lists without their first row, which is null."""
    if not isinstance(rows, list) or len(rows) != count + 1:
        found = len(rows) - 1 if isinstance(rows, list) else "no"
        raise BadReply(f"{found} rows of log-probs of ids for {count} tokens")
    if any(not isinstance(row, list) or len(row) != width for row in rows[1:]):
        raise BadReply(f"a row of log-probs of ids has not {width} of them")
    return rows[1:]


def _named(rows: Any, count: int, chosen: Ids, wanted: Ids) -> Logprobs:
    """[L, K]: of the ids named, those that each position wants."""
    named = np.unique(wanted)
    kept = _rows(rows, count, len(named))
    found = np.empty(wanted.shape, np.float32)
    for row, position in enumerate(chosen.tolist()):
        values, ids = _columns(kept[position], "the log-probs of the ids")
        if (ids != named).any():
            raise BadReply("log-probs of other ids than those asked for")
        found[row] = values[np.searchsorted(named, wanted[row])]
    return found


def _check_ids(ids: Ids, vocab_size: int) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise BadReply(f"the likeliest ids hold something that is not an id below {vocab_size}")
    if (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
        raise BadReply("an id is twice among the likeliest of a position")


def _check_logprobs(values: Logprobs, what: str) -> None:
    bad = ~(np.isfinite(values) & (values <= ABOVE_ZERO))
    if bad.any():
        raise BadReply(f"the log-prob of {what} is {values[bad][0]}")
