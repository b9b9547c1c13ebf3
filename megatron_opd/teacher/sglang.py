"""`SGLangTeacher`: SGLang servers score the tokens of the rollouts, wherever they run.

They give log-probabilities at temperature 1: of the sampled tokens, and of the ids of a support, which are the
teacher's K likeliest or the student's. One rank of a replica of the student asks for all of its microbatches; what
comes back is 4 + 8 K bytes a token.

Shapes: T tokens of a microbatch, N loss positions of all microbatches together, K ids of the support.
"""

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
from megatron_opd.rollout.client import SGLangClient
from megatron_opd.rollout.replicas import ANY_WEIGHTS, Request
from megatron_opd.teacher.dealing import payloads_for_student, rows_for
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
from megatron_opd.teacher.teacher import Asked, Teacher


class SGLangTeacher(SGLangClient, Teacher):
    """Scores at the servers of `connect`.

    `vocab_size` ids exist for the servers' model: of an id beyond, a server would die. With `k` the payload has the
    teacher's k likeliest ids, or those of the student where it is asked about them. A request is about
    `request_tokens` positions at most.
    """

    gives_distributions = False

    def __init__(
        self, groups: ProcessGroupCollection, *, vocab_size: int, k: int = 0, request_tokens: int = 2048
    ) -> None:
        super().__init__()
        self.groups = groups
        self._vocab_size, self._k, self._request_tokens = vocab_size, k, request_tokens

    @property
    def last_stage(self) -> bool:
        """Whether this rank is on the last pipeline stage, where payloads are read."""
        return bool(self.groups.pp.rank() == self.groups.pp.size() - 1)

    @property
    def asks(self) -> bool:
        """Whether this rank is the one of its replica that talks to the servers."""
        return self.last_stage and self.groups.tp.rank() == 0 and self.groups.cp.rank() == 0

    def score(self, asked: Asked) -> list[TeacherPayload | None]:
        """One payload a microbatch on the last pipeline stage, None on the others.

        The student's ids are the support in the place of the teacher's k likeliest: the same K everywhere, the same
        ids on all ranks of a tensor-parallel group. For an evaluation the sampled tokens alone are scored.

        Collectives: over context-parallel ranks 1 all-gather a microbatch (2 with ids, and those of `rows_for`) and 1
        broadcast, over tensor-parallel ones 1 broadcast, and 1 object all-gather over WORLD; those of `student_ids` and
        of `payloads_for_student`. Raises UserError on every rank of WORLD when the servers of one replica fail (see
        `Replicas.run`).
        """
        ids, k = None, 0 if asked.evaluation else self._k
        if asked.student_ids is not None:
            ids = self._at_own_positions(asked.student_ids(), asked.microbatches)
        payloads = self._scored([each.for_teacher for each in asked.microbatches], ids, k)
        return payloads_for_student(payloads, asked.microbatches, self.groups.cp)

    def _at_own_positions(
        self, ids: Sequence[Tensor | None], microbatches: Sequence[Microbatch]
    ) -> Sequence[Tensor | None]:
        """The student's ids as the share of this rank has them in what the teacher reads."""
        if self.groups.cp.size() == 1:
            return ids
        return [
            None if each is None else rows_for(read.for_teacher, read, [each], self.groups.cp)[0]
            for each, read in zip(ids, microbatches, strict=True)
        ]

    def _scored(
        self, microbatches: Sequence[Microbatch], ids: Sequence[Tensor | None] | None, k: int
    ) -> list[ServedLogprobs | None]:
        """One payload for each of these, which are what the teacher reads; with these `ids`, or its `k` likeliest."""
        if not self.last_stage:
            with alike(dist.group.WORLD):
                return [None] * len(microbatches)
        whole = [self._whole(microbatch) for microbatch in microbatches]
        wanted = None if ids is None else self._whole_ids(microbatches, ids)
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
        return self._run(self._connected.run(requests, ANY_WEIGHTS))

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
