"""`SGLangEngine`: responses drawn by SGLang servers, token ids in and out.

A response is asked for by itself, through SGLang's native /generate, with a seed of its own; nothing that comes back is
believed before it is checked. Servers that honour seeds (--enable-deterministic-inference) draw the same response for
the same (seed, prompt id, sample), up to rounding of the logits; others draw anew each time. Under top-p or top-k
their noise goes by rank, not by id: two tokens whose probabilities differ by rounding alone, which the batch decides,
may take each other's place. So it does in a batch that a cut request shares, such as a health check, which is greedy.

Responses may be cut off, by a change of weights when they are drawn ahead, or by somebody else: they keep their tokens,
and the rest is asked for, with the new weights if these have changed.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_opd.data.prompts import Prompt
from megatron_opd.data.rollouts import Rollout
from megatron_opd.errors import UserError
from megatron_opd.objectives.kept_ids import KeptIds
from megatron_opd.rollout.client import SGLangClient
from megatron_opd.rollout.cut_off import joined, weight_spans
from megatron_opd.rollout.replicas import BadReply, Interrupted, Request
from megatron_opd.rollout.sampling import Sampling
from megatron_opd.rollout.sharded import RolloutsStopped, never

STOP_POLL = 0.5  # seconds between two looks whether the run is to stop
SLACK = 1e-3  # nats: rounding of a server's log-probs

Drawing = Future[list[Rollout]] | None  # responses on their way; None on ranks that ask for none


def failed(drawing: Drawing) -> bool:
    """Whether it has ended without responses, and has to be begun again; `SGLangEngine.take` says why."""
    return drawing is not None and drawing.done() and isinstance(drawing.exception(), UserError)


class SGLangEngine(SGLangClient):
    """Draws responses at the servers of `connect`; after `close` these draw no more for it.

    `vocab_size` ids exist for the model that the servers have: of an id beyond, a server would die. One rank of
    `replica` (None: this process alone) talks to the servers, and hands the others what it got. The weights are the
    servers': weight_sync gives them new ones. Once `stopped` says yes, `take` and `generate` raise RolloutsStopped.
    """

    def __init__(
        self,
        vocab_size: int,
        replica: dist.ProcessGroup | None = None,
        *,
        stopped: Callable[[], bool] = never,
    ) -> None:
        super().__init__()
        self._vocab_size, self._replica, self._stopped = vocab_size, replica, stopped
        self._draws_ahead = False  # whether servers may be drawing when the weights change

    @property
    def asks(self) -> bool:
        """Whether this rank is the one that talks to the servers."""
        return self._replica is None or self._replica.rank() == 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, weight_version: int) -> list[Rollout]:
        """`sampling.n` responses to each prompt, in prompt order, then sample order, all by weights `weight_version`.

        Collective over `replica`, 1 object broadcast where it has several ranks: all call it with the same arguments
        and return the same list. Raises UserError on all of them when the servers fail (see `Replicas.run`).
        """
        return self.take(self._submit(prompts, sampling, weight_version, later=False))

    def submit(self, prompts: Sequence[Prompt], sampling: Sampling, oldest: int) -> Drawing:
        """Begin to draw what `generate` would return, and return at once.

        The weights may change meanwhile: no token is drawn by weights older than version `oldest`, and none by older
        ones than the token before it. Not collective.
        """
        self._draws_ahead = True
        return self._submit(prompts, sampling, oldest, later=True)

    def take(self, drawing: Drawing) -> list[Rollout]:
        """The responses, once all are drawn. Collective like `generate`, and raises what it raises."""
        outcome: list[list[Rollout] | UserError | RolloutsStopped] = [[]]
        if drawing is not None:
            try:
                self._wait_unless_stopped(drawing)
                outcome = [self._wait(drawing)]
            except (UserError, RolloutsStopped) as error:
                outcome = [error]
        if self._replica is not None and self._replica.size() > 1:
            dist.broadcast_object_list(outcome, group=self._replica, group_src=0)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def _wait_unless_stopped(self, drawing: Future[list[Rollout]]) -> None:
        """Until the responses are there, or there will be none. A request that is given up ends at its server too."""
        while not futures.wait([drawing], STOP_POLL).done:
            if self._stopped():
                drawing.cancel()
                raise RolloutsStopped

    @contextmanager
    def paused(self, *, tell: bool = True) -> Iterator[None]:
        """`with engine.paused():` this rank asks for nothing, so that the servers can be given other weights.

        With `tell`, on one rank, they draw nothing either: their responses are cut off, whichever rank has asked for
        them, and go on afterwards. Does nothing for an engine whose responses are all taken before the weights change.
        """
        if not self._draws_ahead or self._servers is None:
            yield
            return
        self._run(self._servers.pause(tell=tell))
        try:
            yield
        finally:
            self._run(self._servers.resume(tell=tell))

    def wake(self) -> None:
        """Have the servers go on: a run that was killed while they were paused has left them so."""
        self._run(self._connected.resume(tell=True))

    def _submit(self, prompts: Sequence[Prompt], sampling: Sampling, version: int, *, later: bool) -> Drawing:
        if not self.asks or not prompts:
            return None
        requests = [
            response_request(prompt, sample, sampling, self._vocab_size, version, later=later)
            for prompt in prompts
            for sample in range(sampling.n)
        ]
        return self._start(self._connected.run(requests, str(version), or_newer=later))


def sample_seed(seed: int, prompt_id: str, sample: int) -> int:
    """The seed of one response, 63 bits: servers hash it with the position, so it stands for all of its noise."""
    digest = hashlib.blake2b(f"{seed}|{sample}|{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def request_body(prompt: Prompt, sample: int, sampling: Sampling, vocab_size: int) -> dict[str, Any]:
    """What /generate is sent for one response."""
    ids = prompt.token_ids
    assert ids and min(ids) >= 0 and max(ids) < vocab_size, "an id that the model lacks kills the server"
    return {
        "input_ids": list(ids),
        "return_logprob": True,
        "return_sampling_mask": sampling.cuts and sampling.tells_cut,
        "sampling_params": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            # The mask of what was kept is given for a finite top_k only.
            "top_k": sampling.top_k or (vocab_size if sampling.cuts and sampling.tells_cut else -1),
            "max_new_tokens": sampling.max_new_tokens,
            "stop_token_ids": list(sampling.stop_ids),
            "ignore_eos": not sampling.stop_ids,  # of the stop ids too
            "skip_special_tokens": False,
            "sampling_seed": sample_seed(sampling.seed, prompt.id, sample),
        },
    }


def response_request(
    prompt: Prompt,
    sample: int,
    sampling: Sampling,
    vocab_size: int,
    version: int,
    *,
    later: bool,
    begun: Rollout | None = None,
) -> Request[Rollout]:
    """What `Replicas.run` is given for one response, of which `begun` is there already.

    All of it is drawn with weights of `version`; with `later`, also with newer ones. It may be cut off in between.
    The servers' noise depends on the position, so a seeded response goes on with the noise it would have had.
    """
    told, left = prompt, sampling
    if begun is not None:
        told = replace(prompt, token_ids=prompt.token_ids + begun.response_ids)
        left = replace(sampling, max_new_tokens=sampling.max_new_tokens - len(begun.response_ids))
    read = reply_parser(told, sample, left, vocab_size, version, later=later)

    def parse(reply: Any) -> Rollout:
        rollout = read(reply)
        whole = rollout if begun is None else joined(begun, rollout)
        if whole.finish_reason != "abort":
            return whole
        newest = whole.token_versions[-1] if whole.response_ids else version
        rest = response_request(
            prompt,
            sample,
            sampling,
            vocab_size,
            newest,
            later=later,
            begun=whole if whole.response_ids else None,
        )
        why = reply["meta_info"]["finish_reason"].get("message") or "nothing"
        raise Interrupted(rest, str(newest), why, further=bool(rollout.response_ids))

    return request_body(told, sample, left, vocab_size), parse


def reply_parser(
    prompt: Prompt,
    sample: int,
    sampling: Sampling,
    vocab_size: int,
    weight_version: int,
    *,
    later: bool = False,
) -> Callable[[Any], Rollout]:
    """The function that makes the reply to `request_body` a rollout, or raises BadReply.

    The finish reason of a response that was cut off, anywhere, is "abort". With `later`, newer weights than
    `weight_version` will do.
    """

    def parse(reply: Any) -> Rollout:
        meta = reply.get("meta_info") if isinstance(reply, dict) else None
        if not isinstance(meta, dict):
            raise BadReply("the reply has no meta_info")
        nothing = (
            not reply.get("output_ids") or "prompt_tokens" not in meta
        )  # the latter when it was not running
        if nothing and _kind(meta.get("finish_reason")) == "abort":
            return Rollout(prompt.id, sample, list(prompt.token_ids), [], [], "abort", weight_version)
        ids = _token_ids(reply.get("output_ids"), vocab_size)
        reason = _finish_reason(meta.get("finish_reason"), ids, sampling)
        if not later:
            _check_weights(meta, str(weight_version))
        versions = weight_spans(meta, len(ids), weight_version) if later else [[0, weight_version]]
        if meta.get("prompt_tokens") != len(prompt.token_ids):
            raise BadReply(f"{meta.get('prompt_tokens')} prompt tokens instead of {len(prompt.token_ids)}")
        logprobs = _logprobs(meta.get("output_token_logprobs"), ids)
        drawn_logprobs, kept_ids = logprobs, KeptIds.of()
        if sampling.cuts and sampling.tells_cut:
            kept_ids = _kept_ids(meta.get("output_token_sampling_mask"), ids, vocab_size)
            drawn_logprobs = _drawn_logprobs(meta.get("output_token_sampling_logprobs"), ids, logprobs)
        return Rollout(
            prompt_id=prompt.id,
            sample=sample,
            prompt_ids=list(prompt.token_ids),
            response_ids=ids,
            logprobs=logprobs,
            finish_reason=reason,
            weight_version=versions[0][1],
            version_changes=versions[1:],
            drawn_logprobs=drawn_logprobs,
            kept_ids=kept_ids if sampling.keep_ids else KeptIds.of(),
            teacher_prompt_ids=prompt.teacher_ids,
            route=prompt.route,
        )

    return parse


def _token_ids(ids: Any, vocab_size: int) -> list[int]:
    if not isinstance(ids, list) or not ids:
        raise BadReply("the reply has no output_ids")
    if any(type(token) is not int or not 0 <= token < vocab_size for token in ids):
        raise BadReply(f"output_ids hold something that is not an id below {vocab_size}")
    return ids


def _kind(reason: Any) -> Any:
    return reason.get("type") if isinstance(reason, dict) else None


def _finish_reason(reason: Any, ids: list[int], sampling: Sampling) -> str:
    """ "stop" or "length", as the ids themselves say it, or "abort"."""
    kind = _kind(reason)
    stops = [position for position, token in enumerate(ids) if token in sampling.stop_ids]
    complete = stops[0] == len(ids) - 1 if stops else len(ids) == sampling.max_new_tokens
    if kind == "abort" and not stops and len(ids) < sampling.max_new_tokens:
        return "abort"
    if kind not in ("stop", "length", "abort") or not complete or len(ids) > sampling.max_new_tokens:
        raise BadReply(f"a response of {len(ids)} tokens with the finish reason {reason}")
    return "stop" if stops else "length"


def _check_weights(meta: dict[str, Any], version: str) -> None:
    spans = meta.get("weight_versions") or []
    found = {str(span.get("version")) if isinstance(span, dict) else "?" for span in spans}
    found.add(str(meta.get("weight_version")))
    if found != {version}:
        raise BadReply(f"drawn with the weights {', '.join(sorted(found))} instead of {version}")


def _logprobs(entries: Any, ids: list[int]) -> list[float]:
    """From [log-prob, id, text] for every token."""
    if not isinstance(entries, list) or len(entries) != len(ids):
        count = len(entries) if isinstance(entries, list) else "no"
        raise BadReply(f"{count} log-probs for {len(ids)} tokens")
    logprobs = []
    for entry, token in zip(entries, ids, strict=True):
        value = entry[0] if isinstance(entry, list) and len(entry) > 1 and entry[1] == token else None
        if not isinstance(value, float | int) or not math.isfinite(value) or value > SLACK:
            raise BadReply(f"the log-prob of token {token} is {entry}")
        logprobs.append(float(value))
    return logprobs


def _kept_ids(masks: Any, ids: list[int], vocab_size: int) -> KeptIds:
    """What top-p and top-k left for every token: the token among it."""
    if masks is None:
        raise BadReply("the reply has no output_token_sampling_mask, which SGLang has from 0.5.17 on")
    if not isinstance(masks, list) or len(masks) != len(ids):
        count = len(masks) if isinstance(masks, list) else "no"
        raise BadReply(f"kept ids of {count} tokens for {len(ids)} tokens")
    for row in masks:
        if not isinstance(row, list) or any(
            type(each) is not int or not 0 <= each < vocab_size for each in row
        ):
            raise BadReply(f"the kept ids hold something that is not an id below {vocab_size}")
    kept = KeptIds.of(masks)
    missing = (~kept.hold(torch.tensor(ids))).nonzero()[:, 0].tolist()
    if missing:
        raise BadReply(f"token {ids[missing[0]]} is not among the ids that were kept")
    return kept


def _drawn_logprobs(values: Any, ids: list[int], logprobs: list[float]) -> list[float]:
    """After the cut: never less than before it."""
    if not isinstance(values, list) or len(values) != len(ids):
        count = len(values) if isinstance(values, list) else "no"
        raise BadReply(f"{count} log-probs after the cut for {len(ids)} tokens")
    for value, token, logprob in zip(values, ids, logprobs, strict=True):
        number = isinstance(value, float | int) and math.isfinite(value)
        if not number or not logprob - SLACK <= value <= SLACK:
            raise BadReply(f"the log-prob of token {token} is {logprob:.4g}, after the cut {value}")
    return [float(value) for value in values]
