"""What a teacher behind a server says of each token, in the place of its logits; and the statistics that it allows.

A server gives log-probabilities of single ids: of the sampled token, and of the ids of a support. So the loss is a
policy gradient or a divergence on that support; what needs the teacher's whole distribution is refused
(`combinations`).

Shape suffixes: N tokens, K ids of the support.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from megatron_opd.objectives.logits import LinearLogits
from megatron_opd.objectives.shard import Request
from megatron_opd.objectives.stats import TokenStats
from megatron_opd.objectives.vocab_parallel import compare


@dataclass(frozen=True)
class ServedLogprobs:
    """The teacher's log-probabilities in nats, at temperature 1, the same on every rank of a tensor-parallel group."""

    logprob: Tensor  # [N] float32, of the sampled token
    ids: Tensor | None = None  # [N, K] int64, distinct in a row; the support
    ids_logprob: Tensor | None = None  # [N, K] float32

    def support(self, temperature: float) -> tuple[Tensor, Tensor]:
        """(ids [N, K], log-probabilities [N, K]); at another temperature than 1 up to a constant of each token."""
        assert self.ids is not None and self.ids_logprob is not None
        return self.ids, self.ids_logprob / temperature


def sampled_stats(
    student: Tensor | LinearLogits, served: ServedLogprobs, targets: Tensor, request: Request
) -> TokenStats:
    """Log-probabilities of the sampled tokens alone. One all-gather forward of 3 numbers per token and rank."""
    compared = compare(student, None, targets, None, replace(request, kind="logprob"))
    assert compared.student_logprob is not None
    teacher_logprob_N = served.logprob.to(compared.student_logprob.device)
    estimate_N = compared.student_logprob.detach() - teacher_logprob_N
    return TokenStats(estimate_N, compared.student_logprob, teacher_logprob_N)


def without_scale(stats: TokenStats) -> TokenStats:
    """Without what is known up to a constant only, where the server's temperature is not that of the rollouts."""
    return replace(stats, teacher_logprob=None, teacher_mass=None)
