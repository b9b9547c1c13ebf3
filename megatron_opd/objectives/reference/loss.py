"""The loss of a packed microbatch, dense and in float64: the formula of `Objective`, written out once more.

Shape suffixes: T positions of the buffer, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_opd.objectives.reference.divergence import topk_divergence, vocab_parallel_divergence
from megatron_opd.objectives.reference.policy_gradient import (
    aopd_gate,
    discounted_returns,
    policy_gradient,
    shaped_reward,
    teacher_entropy_gate,
)
from megatron_opd.objectives.reference.token_weights import token_weights

if TYPE_CHECKING:
    from megatron_opd.objectives.kept_ids import KeptIds
    from megatron_opd.objectives.objective import Objective
    from megatron_opd.objectives.stats import TokenStats


def loss(
    objective: Objective,
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    *,
    rollout_logprob: Tensor | None = None,
    old_logprob: Tensor | None = None,
    reference_logprob: Tensor | None = None,
    progress: float = 0.0,
    vocab_size: int | None = None,
    kept: KeptIds | None = None,
) -> Tensor:
    """The scalar sum_t mask_t * w_t * estimator_t: logits [T, V], the others [T] of the whole buffer."""
    kept = kept if objective.kept_ids_only else None
    stats = _stats(objective, student_logits, teacher_logits, targets, rollout_logprob, vocab_size, kept)
    assert stats.student_logprob is not None and stats.teacher_logprob is not None
    old_T = stats.student_logprob.detach() if old_logprob is None else old_logprob.double()
    gap_T = stats.teacher_logprob - old_T
    weights_T = token_weights(gap_T, mask, cu_seqlens, progress=progress, **vars(objective.token_weight))
    estimator_T = stats.divergence
    if objective.divergence == "policy_gradient":
        reward_T = shaped_reward(
            stats.teacher_logprob, old_T, reference_logprob_N=reference_logprob, **vars(objective.shaping)
        )
        estimator_T = _sampled_estimator(
            objective, stats, reward_T, old_T, mask, cu_seqlens, old_logprob, rollout_logprob
        )
    return (weights_T * estimator_T)[mask].sum()


def _stats(
    objective: Objective,
    student_TV: Tensor,
    teacher_TV: Tensor,
    targets_T: Tensor,
    rollout_T: Tensor | None,
    vocab_size: int | None,
    kept: KeptIds | None,
) -> TokenStats:
    sampled_loss = objective.divergence == "policy_gradient"
    if objective.support == "full":
        return vocab_parallel_divergence(
            student_TV,
            teacher_TV,
            kind="reverse_kl" if sampled_loss else objective.divergence,
            beta=objective.beta,
            targets=targets_T,
            temperature=objective.temperature,
            vocab_size=vocab_size,
            kept=kept,
        )
    cap = objective.policy.importance_cap
    return topk_divergence(
        student_TV,
        teacher_TV,
        k=objective.k,
        kind=objective.gate.divergence if sampled_loss else objective.divergence,
        support=objective.support,
        remainder=objective.remainder,
        targets=targets_T,
        rollout_logprob=None if cap is None else rollout_T,
        importance_cap=cap,
        temperature=objective.temperature,
        vocab_size=vocab_size,
        kept=kept,
    )


def _sampled_estimator(
    objective: Objective,
    stats: TokenStats,
    reward_T: Tensor,
    old_T: Tensor,
    mask_T: Tensor,
    cu_seqlens: Tensor,
    old_logprob_T: Tensor | None,
    rollout_T: Tensor | None,
) -> Tensor:
    """Policy gradient, with what the settings add to it and what the gate puts in its place."""
    policy, gate = objective.policy, objective.gate
    assert stats.student_logprob is not None and stats.teacher_logprob is not None
    assert stats.reverse_kl is not None and stats.teacher_entropy is not None
    advantage_T = discounted_returns(
        reward_T,
        mask_T,
        cu_seqlens,
        discount=policy.discount,
        exclude_current=policy.exact_step,
        length_normalized=policy.length_normalized,
    )
    if policy.baseline == "reverse_kl":
        advantage_T = advantage_T + stats.reverse_kl
    estimator_T = policy_gradient(
        stats.student_logprob,
        advantage_T,
        old_logprob_N=old_logprob_T,
        rollout_logprob_N=rollout_T,
        clip_low=policy.clip_low,
        clip_high=policy.clip_high,
        dual_clip=policy.dual_clip,
        importance_cap=policy.importance_cap,
    ).loss_N
    if policy.exact_step:
        return estimator_T + stats.divergence
    if gate.kind == "aopd":
        gated_T = aopd_gate(stats.teacher_logprob, old_T, gate.tau)
        return torch.where(gated_T, gate.coefficient * stats.divergence, estimator_T)
    if gate.kind == "teacher_entropy":
        gated_T = teacher_entropy_gate(stats.teacher_entropy, gate.threshold)
        return estimator_T + gate.coefficient * stats.divergence * gated_T
    return estimator_T
