"""`SGLangTeacher`: SGLang servers score the tokens of the rollouts, wherever they run.

They give log-probabilities at temperature 1: of the sampled tokens, and of the ids of a support, which are the
teacher's K likeliest or the student's. One rank of a replica of the student asks for all of its microbatches; what
comes back is 4 + 8 K bytes a token.

Shapes: T tokens of a microbatch, N loss positions of all microbatches together, K ids of the support.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_opd.checkpoint.folders import alike
from megatron_opd.data.packing import Microbatch
from megatron_opd.objectives import ServedLogprobs, gather_sequence, zigzag_positions
from megatron_opd.rollout.replicas import ANY_WEIGHTS, Replicas, Request
from megatron_opd.teacher.payload import TeacherPayload
from megatron_opd.teacher.score_requests import (
    Ids,
    Scored,
    Span,
    cut_to_limit,
    parse_score,
    score_body,
    spans_of,
)


class SGLangTeacher:
    """Scores at the servers of `connect`; until it is called there are none.

    `vocab_size` ids exist for the servers' model: of an id beyond, a server would die. With `k` the payload has the
    teacher's k likeliest ids. A request is about `request_tokens` positions at most.
    """

    def __init__(
        self, groups: ProcessGroupCollection, *, vocab_size: int, k: int = 0, request_tokens: int = 2048
    ) -> None:
        self.groups = groups
        self._vocab_size, self._k, self._request_tokens = vocab_size, k, request_tokens
        self._runner = asyncio.Runner()  # one event loop for all calls: connections outlive a call
        self._servers: Replicas | None = None

    @property
    def last_stage(self) -> bool:
        """Whether this rank is on the last pipeline stage, where payloads are read."""
        return bool(self.groups.pp.rank() == self.groups.pp.size() - 1)

    @property
    def asks(self) -> bool:
        """Whether this rank is the one of its replica that talks to the servers."""
        return self.last_stage and self.groups.tp.rank() == 0 and self.groups.cp.rank() == 0

    def connect(self, urls: Sequence[str], **options: Any) -> None:
        """Use these servers from now on; `options` are those of `Replicas`."""

        async def make() -> Replicas:
            return Replicas(urls, **options)

        self._servers = self._runner.run(make())

    def close(self) -> None:
        """Close the connections; the servers stay."""
        if self._servers is not None:
            self._runner.run(self._servers.close())
        self._runner.close()

    def ask_all(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """URL -> what that server answers to a POST of `body` (None: to a GET), or the BadReply or UserError."""
        assert self._servers is not None, "connect comes first"
        return self._runner.run(self._servers.fetch_all(path, body))

    def score(
        self,
        microbatches: Sequence[Microbatch],
        ids: Sequence[Tensor | None] | None = None,
        *,
        k: int | None = None,
    ) -> list[ServedLogprobs | None]:
        """One payload a microbatch on the last pipeline stage, None on the others.

        `ids` [n, K] int64 of each microbatch, on the last stage, are the support in the place of the teacher's k
        likeliest; the same K everywhere, the same ids on all ranks of a tensor-parallel group. `k` replaces the
        teacher's own: with 0 the sampled tokens alone are scored.

        Collectives: over context-parallel ranks 1 all-gather a microbatch (2 with `ids`) and 1 broadcast, over
        tensor-parallel ones 1 broadcast, and 1 object all-gather over WORLD. Raises UserError on every rank of it when
        the servers of one replica fail (see `Replicas.run`).
        """
        if not self.last_stage:
            with alike(dist.group.WORLD):
                return [None] * len(microbatches)
        whole = [self._whole(microbatch) for microbatch in microbatches]
        wanted = None if ids is None else self._whole_ids(microbatches, ids)
        k = self._k if k is None else k
        width = k if wanted is None else wanted.shape[1]
        count = sum(int(mask_T.sum()) for _, _, mask_T in whole)
        packed = torch.empty(count, 1 + 2 * width, dtype=torch.int32)
        with alike(dist.group.WORLD):
            if self.asks:
                packed = _pack(self._ask(whole, microbatches, wanted, k), packed)
        packed = packed.to(microbatches[0].tokens_T.device)
        if self.groups.tp.rank() == 0 and self.groups.cp.size() > 1:
            dist.broadcast(packed, group=self.groups.cp, group_src=0)
        if self.groups.tp.size() > 1:
            dist.broadcast(packed, group=self.groups.tp, group_src=0)
        return self._dealt(packed, whole, microbatches)

    def distribution(self, payload: TeacherPayload, *, chunked: bool) -> ServedLogprobs:
        """The payload itself."""
        del chunked
        assert isinstance(payload, ServedLogprobs)
        return payload

    def _whole(self, microbatch: Microbatch) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, targets and mask [T] of all context-parallel ranks together."""
        rows = torch.stack([microbatch.tokens_T, microbatch.targets_T, microbatch.mask_T.long()])
        tokens_T, targets_T, mask_T = gather_sequence(rows, microbatch.cu_seqlens, self.groups.cp)
        return tokens_T, targets_T, mask_T.bool()

    def _whole_ids(self, microbatches: Sequence[Microbatch], ids: Sequence[Tensor | None]) -> Ids:
        """Ids [N, K] of all loss positions, of all context-parallel ranks together."""
        found = []
        for microbatch, ids_nK in zip(microbatches, ids, strict=True):
            assert ids_nK is not None
            rows_KT = ids_nK.new_full((ids_nK.shape[1], len(microbatch.mask_T)), -1)
            rows_KT[:, microbatch.mask_T] = ids_nK.t()
            whole_KT = gather_sequence(rows_KT, microbatch.cu_seqlens, self.groups.cp)
            mask_1T = gather_sequence(microbatch.mask_T.long()[None], microbatch.cu_seqlens, self.groups.cp)
            found.append(whole_KT[:, mask_1T[0].bool()].t())
        return torch.cat(found).cpu().numpy()

    def _ask(
        self,
        whole: Sequence[tuple[Tensor, Tensor, Tensor]],
        microbatches: Sequence[Microbatch],
        wanted: Ids | None,
        k: int,
    ) -> list[Scored]:
        """What the servers say of all spans, in the order of the loss positions."""
        assert self._servers is not None, "connect comes before score"
        requests: list[Request[Scored]] = []
        row = 0
        for (tokens_T, targets_T, mask_T), microbatch in zip(whole, microbatches, strict=True):
            for span in spans_of(tokens_T, targets_T, mask_T, microbatch.cu_seqlens, self._request_tokens):
                rows = slice(row, row + len(span.positions))
                row = rows.stop
                if wanted is None:
                    requests.append(self._request(span, None, k))
                else:
                    requests += [self._request(*part, 0) for part in cut_to_limit(span, wanted[rows])]
        return self._runner.run(self._servers.run(requests, ANY_WEIGHTS))

    def _request(self, span: Span, wanted: Ids | None, k: int) -> Request[Scored]:
        """A request about a span, with the function that makes the reply a result."""
        ids = span.tokens if wanted is None else np.append(span.tokens, wanted)
        assert ids.min() >= 0 and ids.max() < self._vocab_size, "an id that the model lacks kills the server"

        def parse(reply: Any) -> Scored:
            return parse_score(reply, span, k, wanted, self._vocab_size)

        return score_body(span, k, wanted), parse

    def _dealt(
        self,
        packed: Tensor,
        whole: Sequence[tuple[Tensor, Tensor, Tensor]],
        microbatches: Sequence[Microbatch],
    ) -> list[ServedLogprobs | None]:
        """This rank's share of each microbatch's rows."""
        width = packed.shape[1] // 2
        rank, ranks = self.groups.cp.rank(), self.groups.cp.size()
        payloads: list[ServedLogprobs | None] = []
        row = 0
        for (_, _, mask_T), microbatch in zip(whole, microbatches, strict=True):
            mine_T = zigzag_positions(microbatch.cu_seqlens, rank, ranks).to(mask_T.device)
            rows_T = row + mask_T.long().cumsum(0) - 1
            mine = packed[rows_T[mine_T[microbatch.mask_T]]]
            row += int(mask_T.sum())
            logprobs = mine[:, : 1 + width].contiguous().view(torch.float32)
            ids = mine[:, 1 + width :].long() if width else None
            payloads.append(ServedLogprobs(logprobs[:, 0], ids, logprobs[:, 1:] if width else None))
        return payloads


def _pack(scored: Sequence[Scored], packed: Tensor) -> Tensor:
    """[N, 1 + 2 K] int32: the log-probs of the tokens, those of the support, bit for bit, and its ids."""
    if not scored:
        return packed
    logprobs = [np.column_stack([each.logprob, each.ids_logprob]).view(np.int32) for each in scored]
    rows = [
        np.hstack([values, each.ids.astype(np.int32)]) for values, each in zip(logprobs, scored, strict=True)
    ]
    return torch.from_numpy(np.concatenate(rows))
