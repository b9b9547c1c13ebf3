"""What a teacher says of each token in the place of its logits, as one behind a server does; and the statistics of it.

Those are log-probabilities of single ids: of the sampled token, and of the ids of a support. So the loss is a policy
gradient or a divergence on that support; what needs the teacher's whole distribution is refused (`combinations`).

Shape suffixes: N tokens, K ids of the support.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.objectives.logits import LinearLogits
from megatron_opd.objectives.shard import Request
from megatron_opd.objectives.stats import TokenStats
from megatron_opd.objectives.vocab_parallel import compare


@dataclass(frozen=True)
class ServedLogprobs:
    """The teacher's log-probabilities in nats, the same on every rank of a tensor-parallel group.

    They are of the temperature that the objective knows as `served_at`.
    """

    logprob: Tensor  # [N] float32, of the sampled token
    ids: Tensor | None = None  # [N, K] int32 or int64, distinct in a row; the support
    ids_logprob: Tensor | None = None  # [N, K] float32

    def support(self) -> tuple[Tensor, Tensor]:
        """(ids [N, K], log-probabilities [N, K])."""
        assert self.ids is not None and self.ids_logprob is not None
        return self.ids, self.ids_logprob

    def scaled(self, factor: float) -> ServedLogprobs:
        """Those of logits times `factor`, another temperature's: up to a constant of each token."""
        if factor == 1.0:
            return self
        scaled_NK = None if self.ids_logprob is None else self.ids_logprob * factor
        return ServedLogprobs(self.logprob * factor, self.ids, scaled_NK)

    def raise_if_nan(self) -> None:
        """FloatingPointError, on every rank of a tensor-parallel group alike."""
        bad_N = self.logprob.isnan()
        if self.ids_logprob is not None:
            bad_N = bad_N | self.ids_logprob.isnan().any(1)
        if bad_N.any():
            raise FloatingPointError(
                f"teacher log-probs are NaN at {int(bad_N.sum())} of {bad_N.numel()} tokens, first at token "
                f"{int(bad_N.nonzero()[0, 0])}"
            )


@torch.no_grad()
def served_logprobs(
    logits: Tensor | LinearLogits,
    targets: Tensor,
    k: int = 0,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> ServedLogprobs:
    """What a server would say of these logits: of the targets [N] and, with `k`, of the k likeliest ids (int32).

    Options as `vocab_parallel_divergence`. One all-gather of 3 + 2 k numbers per token and rank.
    """
    request = Request(
        temperature=temperature,
        vocab_size=vocab_size,
        group=group,
        chunk_size=chunk_size,
        best_of="student" if k else None,
        k=k,
    )
    compared = compare(logits, None, targets, None, request)
    assert compared.student_logprob is not None
    if compared.ids is None or compared.ids_student_logprob is None:
        return ServedLogprobs(compared.student_logprob)
    ids_logprob_NK = compared.ids_student_logprob.contiguous()
    return ServedLogprobs(compared.student_logprob, compared.ids.int(), ids_logprob_NK)


def sampled_stats(
    student: Tensor | LinearLogits, served: ServedLogprobs, targets: Tensor, request: Request
) -> TokenStats:
    """Log-probabilities of the sampled tokens alone. One all-gather forward of 3 numbers per token and rank, 4 with
    the student's entropy."""
    compared = compare(student, None, targets, None, replace(request, kind="logprob"))
    assert compared.student_logprob is not None
    teacher_logprob_N = served.logprob.to(compared.student_logprob.device)
    estimate_N = compared.student_logprob.detach() - teacher_logprob_N
    return TokenStats(estimate_N, compared.student_logprob, teacher_logprob_N, compared.student_entropy)


def without_scale(stats: TokenStats) -> TokenStats:
    """Without what is known up to a constant only, where the teacher's temperature is not that of the rollouts."""
    return replace(stats, teacher_logprob=None, teacher_mass=None)
