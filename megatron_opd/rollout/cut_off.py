"""Responses that a change of weights has cut off: which weights drew what, and how their parts become one."""

from dataclasses import replace
from typing import Any

from megatron_opd.data.rollouts import Rollout
from megatron_opd.objectives.kept_ids import KeptIds
from megatron_opd.rollout.replicas import BadReply


def joined(first: Rollout, rest: Rollout) -> Rollout:
    """A response from its beginning, which was cut off, and what was drawn after it as a response of its own."""
    if not rest.response_ids:
        return first
    length = len(first.response_ids)
    changes = [[length + token, version] for token, version in rest.version_changes]
    if rest.weight_version != first.token_versions[-1]:
        changes.insert(0, [length, rest.weight_version])
    return replace(
        first,
        response_ids=first.response_ids + rest.response_ids,
        logprobs=first.logprobs + rest.logprobs,
        drawn_logprobs=first.drawn_logprobs + rest.drawn_logprobs,
        kept_ids=KeptIds.joined([first.kept_ids, rest.kept_ids]),
        finish_reason=rest.finish_reason,
        version_changes=first.version_changes + changes,
    )


def weight_spans(meta: dict[str, Any], tokens: int, oldest: int) -> list[list[int]]:
    """[first token, version] of every span of the response that weights of one version drew, from its meta_info.

    Raises BadReply for spans that do not cover the `tokens`, and for versions that are older than `oldest` or go back.
    """
    whole = {"version": meta.get("weight_version"), "start": 0, "end": tokens}
    spans = meta.get("weight_versions") or [whole]
    try:
        found = [[int(span["start"]), int(span["version"])] for span in spans]
    except (TypeError, KeyError, ValueError):
        raise BadReply(f"the weights that drew it are {spans}") from None
    starts, versions = ([row[column] for row in found] for column in (0, 1))
    if starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= tokens:
        raise BadReply(f"the weights that drew {tokens} tokens are {spans}")
    if versions != sorted(versions) or versions[0] < oldest:
        raise BadReply(f"drawn with the weights {versions} instead of {oldest} and newer ones")
    return found
