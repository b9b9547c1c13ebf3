"""Divergence of student and teacher over a vocabulary sharded by tensor parallelism: exact, one collective.

Shape suffixes: N tokens, V columns of the shard, R ranks of the group.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megatron_opd.objectives.kept_ids import KeptIds
from megatron_opd.objectives.logits import LinearLogits
from megatron_opd.objectives.shard import DIVERGENCE_KINDS, Request
from megatron_opd.objectives.stats import TokenStats
from megatron_opd.objectives.vocab_parallel import compare


def vocab_parallel_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    targets: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    entropies: bool = False,
    check: bool = False,
    inplace_backward: bool = False,
    kept: KeptIds | None = None,
) -> TokenStats:
    """Full-vocabulary divergence and log-probability of `targets` per token, differentiable in the student.

    With p = softmax(logits / temperature), and the teacher a constant:

        reverse_kl  KL(p_s || p_t);                                dz_s = p_s (log p_s - log p_t - KL) / T
        forward_kl  KL(p_t || p_s);                                dz_s = (p_s - p_t) / T
        jsd         beta KL(p_t || m) + (1 - beta) KL(p_s || m),   m = beta p_t + (1 - beta) p_s (GKD, arXiv
                    2306.13649);                dz_s = (1 - beta) p_s (log p_s - log m - KL(p_s || m)) / T

    Collectives over `group`: one all-gather forward of 5 numbers per token and rank (1 more for forward_kl, 2
    with targets, 2 with entropies), for jsd a second one of 2; none backward; none at all without a group or in
    a group of one. Saved for backward: the two logits shards as they are and numbers of size [N]. Statistics
    are float64 for float64 logits, else float32; the gradient has the dtype of the student's logits.

    Args:
        student_logits: [N, V/TP], this rank's shard; any floating dtype. Rank r of the group holds the ids
            r * V/TP to (r + 1) * V/TP - 1.
        teacher_logits: [N, V/TP], the same ids; its dtype may differ. Where one rank holds the whole vocabulary
            and vocab_size is given, its padding may have another length.
        kind: "reverse_kl", "forward_kl" or "jsd".
        beta: the teacher's share of the mixture of jsd, between 0 and 1.
        targets: [N] global token ids. An id outside the vocabulary has log-probability -inf.
        temperature: divides both logits; positive.
        vocab_size: number of real ids; ids from here on count as -inf whatever the logits hold. Default: all.
        group: the tensor-parallel group. None: this rank holds the whole vocabulary.
        entropies: also return the entropies of student and teacher, detached.
        check: judge the gathered statistics and raise FloatingPointError on every rank alike, naming the
            tensor, when a logits shard holds NaN or +inf, a token has no finite logit, or one model excludes an
            id that the divergence needs. Costs one device synchronisation.
        inplace_backward: write the gradient into the storage of student_logits, which must not be used after.
        kept: ids per token that both softmaxes are restricted to, divergence, log-probabilities and entropies alike;
            ids outside count as -inf. The logits are then read in masked copies of a bounded size.

    Raises:
        ValueError: unknown kind, shapes that do not agree, or an option out of range.
    """
    request = Request(
        kind=known_kind(kind),
        beta=beta,
        temperature=temperature,
        vocab_size=vocab_size,
        group=group,
        entropies=entropies,
        check=check,
        inplace_backward=inplace_backward,
        kept=kept,
    )
    return full_support_stats(student_logits, teacher_logits, targets, request)


def known_kind(kind: str) -> str:
    """The kind itself; ValueError unless it is a full-vocabulary divergence."""
    if kind not in DIVERGENCE_KINDS:
        raise ValueError(f"unknown divergence kind {kind!r}; supported: {', '.join(DIVERGENCE_KINDS)}")
    return kind


def full_support_stats(
    student: Tensor | LinearLogits, teacher: Tensor | LinearLogits, targets: Tensor | None, request: Request
) -> TokenStats:
    """`compare` over the whole vocabulary, as TokenStats."""
    compared = compare(student, teacher, targets, None, request)
    assert compared.divergence is not None
    return TokenStats(
        compared.divergence,
        compared.student_logprob,
        compared.teacher_logprob,
        compared.student_entropy,
        compared.teacher_entropy,
        compared.reverse_kl,
    )
