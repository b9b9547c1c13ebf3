"""Divergence on a support of K ids per token instead of the whole vocabulary (local support matching and kin).

The support is the top-K of one model, found across vocabulary shards in the one gather that the statistics need
anyway, or ids that a teacher server named. What follows is small: [N, K] log-probabilities of both models and
plain autograd.

Shape suffixes: N tokens, V columns of the shard, K ids of the support.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.objectives.kept_ids import KeptIds
from megatron_opd.objectives.logits import LinearLogits
from megatron_opd.objectives.shard import Request
from megatron_opd.objectives.stats import TokenStats
from megatron_opd.objectives.vocab_parallel import Compared, compare

SUPPORTS = ("teacher_topk", "student_topk", "teacher_topk_sampled", "student_topk_sampled")
REMAINDERS = ("renormalize", "bucket", "none", "mass_correction", "sampled_tail")
TOPK_KINDS = ("reverse_kl", "forward_kl")


def topk_divergence(
    student_logits: Tensor | LinearLogits,
    teacher_logits: Tensor | LinearLogits | tuple[Tensor, Tensor],
    *,
    k: int | None = None,
    kind: str = "reverse_kl",
    support: str = "teacher_topk",
    remainder: str = "renormalize",
    targets: Tensor | None = None,
    teacher_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    importance_cap: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    entropies: bool = False,
    check: bool = False,
    inplace_backward: bool = False,
    chunk_size: int | None = None,
    sequence_parallel: bool = False,
    kept: KeptIds | None = None,
) -> TokenStats:
    """Divergence on the support S per token, differentiable in the student; and the masses both models give S.

    With p, q the student's and teacher's probabilities of the ids of S (of the whole vocabulary's softmax):

        remainder        reverse_kl                                forward_kl
        renormalize      sum p^ log(p^/q^), p^ = p / sum_S p       sum q^ log(q^/p^)             (LSM, 2603.25562)
        bucket           sum over S and one outcome for the rest, 1 - sum_S        the same, exchanged
        none             sum p log(p/q)                            sum q log(q/p)                (AOPD, EOPD)
        mass_correction  sum p log(p/q) - p + q                    sum q log(q/p) - q + p        (MOPD)
        sampled_tail     none, plus where the sampled token y lies outside S: s * rho * sg(log p(y)/q(y)), rho =
                         p(y)/sg p(y), s = min(p(y)/rollout's probability, importance_cap), 1 without
                         rollout_logprob (variants V4 and V5 of 2603.25562); reverse_kl only. The gradient of
                         sum_S p is taken off, which the published form leaves in: so the expected gradient is
                         that of the full reverse KL, and it is 0 for teacher = student

    "none" is no divergence: it can be negative (reverse_kl) and teacher = student is not its minimum; the gradient
    of the forward form there is (sum_S p) p_v - p_v 1[v in S]. renormalize with K = 1 is 0 with gradient 0.
    bucket resolves masses of the rest down to the precision of the statistics. An id that the choosing model
    excludes (-inf) is never in the support, and a token whose support is empty has divergence and gradient 0.

    Collectives over `group`: one all-gather forward, of 5 + 3 K numbers per token and rank, 2 more with targets
    and 2 with entropies (2 + K with ids from a server, and 1 more with either); none backward for logits, one
    all-reduce [N, D] for LinearLogits. Saved: the inputs and numbers of size [N, K].

    Args:
        student_logits: [N, V/TP], or LinearLogits for chunks of `chunk_size` tokens.
        teacher_logits: [N, V/TP] or LinearLogits; or (topk_ids [N, K], topk_logprobs [N, K]) from a server that
            scored at the same temperature, ids distinct in a row, -1 where there are fewer (ids outside the
            vocabulary count as that): then they are the support, without or with the sampled token as `support`
            says, and k is not given.
        k: ids of the support; more than the vocabulary has means all of them.
        support: "teacher_topk", "student_topk", either with "_sampled": union with the target.
        targets: [N] sampled ids; needed by the unions and by sampled_tail.
        teacher_logprob: [N] the server's log-probability of the targets; read only with ids from a server, and
            needed there by the unions and by sampled_tail.
        rollout_logprob: [N] log-probability of the targets under the policy that drew them, after any cut;
            sampled_tail only.
        importance_cap: upper bound of s; sampled_tail only.
        others: as `vocab_parallel_divergence` and `linear_divergence`. With kept the support is chosen among the
            kept ids.

    Raises:
        ValueError: unknown names, options that do not combine, shapes that do not agree.
    """
    served = isinstance(teacher_logits, tuple) and not isinstance(teacher_logits, LinearLogits)
    _check(kind, support, remainder, k, served, targets, teacher_logprob)
    if served and kept is not None:
        raise ValueError(
            "kept: the ids of a server are no distribution over the kept ids: score with all logits"
        )
    request = Request(
        temperature=temperature,
        vocab_size=vocab_size,
        group=group,
        entropies=entropies,
        check=check,
        inplace_backward=inplace_backward,
        chunk_size=chunk_size,
        sequence_parallel=sequence_parallel,
        best_of=None if served else support.partition("_")[0],
        k=0 if k is None else k,
        kept=kept,
    )
    compared, targets = _compare(student_logits, teacher_logits, targets, teacher_logprob, request)
    student_NK, teacher_NK = _log_probabilities(compared, targets, union=support.endswith("_sampled"))
    divergence_N = _DIVERGENCES[remainder](*_ordered(kind, student_NK, teacher_NK))
    if remainder == "sampled_tail":
        assert targets is not None
        divergence_N = divergence_N + _sampled_tail(compared, targets, rollout_logprob, importance_cap)
    return TokenStats(
        divergence_N,
        compared.student_logprob,
        compared.teacher_logprob,
        compared.student_entropy,
        compared.teacher_entropy,
        compared.reverse_kl,
        student_NK.detach().exp().sum(1),
        teacher_NK.exp().sum(1),
    )


def _compare(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits | tuple[Tensor, Tensor],
    targets: Tensor | None,
    teacher_logprob: Tensor | None,
    request: Request,
) -> tuple[Compared, Tensor | None]:
    """The two models on the support, whichever way the teacher speaks; and the targets on the logits' device."""
    device = student.hidden.device if isinstance(student, LinearLogits) else student.device
    targets = None if targets is None else targets.to(device)
    if isinstance(teacher, Tensor | LinearLogits):
        return compare(student, teacher, targets, None, request), targets
    ids_NK, logprobs_NK = teacher
    if ids_NK.shape != logprobs_NK.shape:
        shapes = f"{tuple(ids_NK.shape)} and {tuple(logprobs_NK.shape)}"
        raise ValueError(f"topk_ids and topk_logprobs must have the same shape [N, K], not {shapes}")
    compared = compare(student, None, targets, ids_NK, request)
    teacher_logprob = None if teacher_logprob is None else teacher_logprob.detach().to(device)
    return compared._replace(
        ids_teacher_logprob=logprobs_NK.detach().to(device), teacher_logprob=teacher_logprob
    ), targets


def _check(
    kind: str,
    support: str,
    remainder: str,
    k: int | None,
    served: bool,
    targets: Tensor | None,
    teacher_logprob: Tensor | None,
) -> None:
    for name, value, known in (
        ("divergence kind", kind, TOPK_KINDS),
        ("support", support, SUPPORTS),
        ("remainder", remainder, REMAINDERS),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; supported: {', '.join(known)}")
    if served and k is not None:
        raise ValueError("k: ids from a server are the whole support; do not give k")
    if not served and (k is None or k < 1):
        raise ValueError(f"k must be at least 1, not {k}")
    union = support.endswith("_sampled")
    if remainder == "sampled_tail" and (kind != "reverse_kl" or union):
        raise ValueError("remainder sampled_tail needs reverse_kl and a support without the sampled token")
    if union or remainder == "sampled_tail":
        reader = f"support {support}" if union else f"remainder {remainder}"
        if targets is None:
            raise ValueError(f"{reader} needs targets")
        if served and teacher_logprob is None:
            raise ValueError(f"{reader} needs the server's log-probability of the targets: teacher_logprob")


def _log_probabilities(compared: Compared, targets: Tensor | None, *, union: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher on the support, [N, K] or [N, K + 1]; -inf where an id is absent."""
    assert compared.ids is not None and compared.ids_student_logprob is not None
    assert compared.ids_teacher_logprob is not None
    student_NK = compared.ids_student_logprob
    teacher_NK = compared.ids_teacher_logprob.to(student_NK.dtype).masked_fill(compared.ids < 0, -torch.inf)
    if not union:
        return student_NK, teacher_NK
    assert (
        targets is not None and compared.student_logprob is not None and compared.teacher_logprob is not None
    )
    inside_N1 = (compared.ids == targets[:, None]).any(1, keepdim=True)
    student_N1 = compared.student_logprob[:, None].masked_fill(inside_N1, -torch.inf)
    teacher_N1 = compared.teacher_logprob[:, None].to(student_NK.dtype).masked_fill(inside_N1, -torch.inf)
    return torch.cat([student_NK, student_N1], 1), torch.cat([teacher_NK, teacher_N1], 1)


def _ordered(kind: str, student_NK: Tensor, teacher_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(the model that the expectation is over, the other)."""
    return (student_NK, teacher_NK) if kind == "reverse_kl" else (teacher_NK, student_NK)


def _expected_gap(first_NK: Tensor, second_NK: Tensor) -> Tensor:
    """sum p_1 (log p_1 - log p_2), where ids of probability 0 add 0 and have no gradient; NaN shows in both."""
    gap_NK = (first_NK - second_NK).where(first_NK != -torch.inf, 0.0)
    return (first_NK.exp() * gap_NK).sum(1)


def _renormalized(first_NK: Tensor, second_NK: Tensor) -> Tensor:
    return _expected_gap(_log_shares(first_NK), _log_shares(second_NK))


def _log_shares(logprob_NK: Tensor) -> Tensor:
    """Log of each id's share of the support's mass; -inf, and no NaN, where the support has no mass."""
    massless_N1 = (logprob_NK == -torch.inf).all(1, keepdim=True)
    return logprob_NK - logprob_NK.masked_fill(massless_N1, 0.0).logsumexp(1, keepdim=True)


def _bucketed(first_NK: Tensor, second_NK: Tensor) -> Tensor:
    # Below the precision of a sum of probabilities a rest cannot be told from none.
    smallest = torch.finfo(first_NK.dtype).eps
    first_N = (1.0 - first_NK.exp().sum(1)).clamp(min=smallest)
    second_N = (1.0 - second_NK.exp().sum(1)).clamp(min=smallest)
    return _expected_gap(first_NK, second_NK) + first_N * (first_N.log() - second_N.log())


def _mass_corrected(first_NK: Tensor, second_NK: Tensor) -> Tensor:
    return _expected_gap(first_NK, second_NK) + (second_NK.exp() - first_NK.exp()).sum(1)


def _without_mass_gradient(first_NK: Tensor, second_NK: Tensor) -> Tensor:
    mass_N = first_NK.exp().sum(1)
    return _expected_gap(first_NK, second_NK) - (mass_N - mass_N.detach())


_DIVERGENCES = {
    "renormalize": _renormalized,
    "bucket": _bucketed,
    "none": _expected_gap,
    "mass_correction": _mass_corrected,
    "sampled_tail": _without_mass_gradient,
}


def _sampled_tail(
    compared: Compared, targets: Tensor, rollout_logprob: Tensor | None, importance_cap: float | None
) -> Tensor:
    """The sampled estimate of what lies outside the support, [N]; 0 where the sampled token lies inside."""
    assert compared.ids is not None
    assert compared.student_logprob is not None and compared.teacher_logprob is not None
    outside_N = ~(compared.ids == targets[:, None]).any(1)
    student_N = compared.student_logprob
    gap_N = (student_N.detach() - compared.teacher_logprob).where(outside_N, 0.0)
    if rollout_logprob is not None:
        importance_N = (student_N.detach() - rollout_logprob.to(student_N.device)).exp()
        if importance_cap is not None:
            importance_N = importance_N.clamp(max=importance_cap)
        gap_N = gap_N * importance_N.where(outside_N, 1.0)
    return gap_N * (student_N - student_N.detach()).exp()
