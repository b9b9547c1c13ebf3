"""Policy gradient on the sampled tokens: the surrogate loss of each token, and the returns it may carry.

Sampled-token on-policy distillation maximises the log-gap A_t = log p_t(y_t) - log p_s(y_t) as if it were a
reward: the gradient of the loss is -A_t * grad log p_s(y_t). With returns of discount 0 that is the
token-level method, with discount 1 its expectation is the gradient of KL(p_s || p_t) over whole sequences.

Shape suffixes: N tokens in any order, T positions of a packed buffer, S responses in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_opd.objectives.scan import discounted_suffix_sums

BASELINES = ("none", "reverse_kl")


@dataclass(frozen=True)
class PolicyGradient:
    """Settings of the estimator on the sampled tokens; ValueError that names the field for a bad value.

    clip_low, clip_high: PPO's clip of the ratio p_s / p_old to [1 - clip_low, 1 + clip_high]; None: no bound
        on that side. 0.2 are the authors' values of IW-OPD and AOPD.
    dual_clip: for A < 0 the ratio counts at most this much, > 1 (dual-clip PPO, arXiv 1912.09729); None: off.
    importance_cap: the largest weight against the policy that drew the tokens (truncated importance sampling);
        None: that correction is off. After a top-p or top-k cut that policy is the engine's renormalised over the
        kept ids. The weight of an unrestricted student is then its probability of the kept ids, not 1: the sum over
        the kept ids comes out right, the ids that were cut are never seen. With `Objective.kept_ids_only` it is 1.
        (Revisiting OPD, arXiv 2603.25562, draws with top-p 0.9 and corrects for nothing: its divergence needs no
        weight, and its variants with a sampled tail compare with the engine's log-probabilities before the cut.)
    discount: in [0, 1], of later rewards: 0 is the token-level method, 1 the sequence-level one
        (Revisiting OPD, arXiv 2603.25562, Eq. 2-3).
    baseline: "reverse_kl" subtracts the expected reward of a token, V(c_t) = -KL_t(p_s || p_t), from its
        return, so that the advantage is R_t + KL_t with KL_t detached (vOPD). The expected gradient is the
        same. Its variance falls where the teacher is the sharper one of the two; where the student is, it
        may rise: its rare tokens, whose scores are the largest, then have positive gaps, and KL_t adds to them.
    exact_step: the current token's term is the exact divergence of that position, the estimator carries the
        rewards behind it (MiniLLM, arXiv 2306.08543: single-step and long part). Same expected gradient.
    length_normalized: returns are averages over their tokens instead of sums (MiniLLM). Not the same
        expected gradient.
    """

    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = 3.0
    importance_cap: float | None = 5.0
    discount: float = 0.0
    baseline: str = "none"
    exact_step: bool = False
    length_normalized: bool = False

    def __post_init__(self) -> None:
        _check_bounds(self.clip_low, self.clip_high, self.dual_clip, self.importance_cap)
        _check_discount(self.discount)
        if self.baseline not in BASELINES:
            raise ValueError(f"unknown baseline {self.baseline!r}; supported: {', '.join(BASELINES)}")


class PolicyLoss(NamedTuple):
    """What `policy_gradient` returns for every token."""

    loss_N: Tensor  # differentiable in the student's log-probabilities
    clipped_N: Tensor  # bool: a bound replaces the ratio, the token has no gradient
    importance_N: Tensor  # detached weight against the rollout engine


def policy_gradient(
    student_logprob_N: Tensor,
    advantage_N: Tensor,
    *,
    old_logprob_N: Tensor | None = None,
    rollout_logprob_N: Tensor | None = None,
    mask_N: Tensor | None = None,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = 3.0,
    importance_cap: float | None = 5.0,
) -> PolicyLoss:
    """The clipped surrogate loss of every token [N], neither weighted nor averaged. No collectives.

    With ratio = p_s / p_old of the sampled token,

        loss = -importance * min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)     for A >= 0
        loss = -importance * max(the same minimum, dual_clip * A)                             for A < 0
        importance = min(p_old / p_rollout, importance_cap)

    that is PPO's clip, dual-clip PPO's bound (arXiv 1912.09729) and truncated importance sampling. Both
    bounds amount to one clamp of the ratio: from above for A > 0, to [1 - clip_low, dual_clip] for A < 0. A
    ratio on a bound is not clipped. Without bounds, old and rollout log-probabilities this is the estimator
    of Thinking Machines' on-policy distillation with A = log p_t - log p_s.

    Args:
        student_logprob_N: [N] log-probability of the sampled tokens, the only input with a gradient; loss
            and importance have its dtype.
        advantage_N: [N], taken as a constant.
        old_logprob_N: [N] before the first update on this rollout. None: the update is on-policy, the ratio
            is 1 and its gradient that of log p_s; the gradient of a token is -importance * A exactly.
        rollout_logprob_N: [N] under the policy that drew the tokens, after any cut. None: importance is 1.
        mask_N: [N] bool. Where it is False all inputs count as 0 and may hold anything, NaN included: loss
            and gradient are 0, nothing is clipped.
        clip_low, clip_high, dual_clip, importance_cap: see `PolicyGradient`.

    ValueError: bounds out of range, shapes that do not agree.
    """
    _check_bounds(clip_low, clip_high, dual_clip, importance_cap)
    given = {"advantage": advantage_N, "old": old_logprob_N, "rollout": rollout_logprob_N, "mask": mask_N}
    _check_shapes(student_logprob_N, given)
    if mask_N is not None:
        student_logprob_N = student_logprob_N.where(mask_N, 0.0)
    advantage_N = _constant(advantage_N, student_logprob_N, mask_N)
    old_N = _constant(
        student_logprob_N if old_logprob_N is None else old_logprob_N, student_logprob_N, mask_N
    )
    importance_N = torch.ones_like(old_N)
    if rollout_logprob_N is not None and importance_cap is not None:
        rollout_N = _constant(rollout_logprob_N, student_logprob_N, mask_N)
        importance_N = (old_N - rollout_N).exp().clamp(max=importance_cap)
    log_ratio_N = student_logprob_N - old_N
    bound_N, clipped_N = _clip(log_ratio_N.detach().exp(), advantage_N, clip_low, clip_high, dual_clip)
    # The exponential is not taken of a clipped log-ratio: where that overflows its gradient is 0 * inf.
    ratio_N = bound_N.where(clipped_N, log_ratio_N.masked_fill(clipped_N, 0.0).exp())
    return PolicyLoss(-(importance_N * advantage_N) * ratio_N, clipped_N, importance_N)


def discounted_returns(
    reward_T: Tensor,
    mask_T: Tensor,
    cu_seqlens: Tensor,
    *,
    discount: float,
    exclude_current: bool = False,
    length_normalized: bool = False,
) -> Tensor:
    """Discounted sum of the rewards from each token on, [T], detached; float32 (float64 for float64 rewards).

        R_t = sum_{t' >= t} discount^(t' - t) r_t'        over the unmasked t' of the same response

    (arXiv 2603.25562, Eq. 3). discount 0 gives the reward itself, discount 1 the reward to go, whose
    expected gradient is that of the sequence-level reverse KL. t' - t counts positions, so masked positions
    between two tokens (a tool's output) are part of their distance.

    exclude_current: only t' > t, with the same exponents: the long part of MiniLLM (arXiv 2306.08543), whose
    single-step part is the exact divergence. With discount 0 that leaves 0.
    length_normalized: R_t divided by the number of unmasked tokens summed over, 0 if there is none (MiniLLM).

    Responses are the segments of cu_seqlens [S + 1], which ends at T, in sequence order: under context
    parallelism gather the sequence first. Masked positions have return 0 and may hold anything, NaN
    included. No collectives. ValueError: discount outside [0, 1], shapes that do not agree.
    """
    _check_discount(discount)
    _check_shapes(reward_T, {"mask": mask_T})
    mask_T = mask_T.bool()
    dtype = torch.float64 if reward_T.dtype == torch.float64 else torch.float32
    reward_T = reward_T.detach().double().where(mask_T, 0.0)
    return_T = discounted_suffix_sums(reward_T, cu_seqlens, discount)
    if exclude_current:
        return_T = return_T - reward_T
    if length_normalized:
        count_T = discounted_suffix_sums(mask_T.double(), cu_seqlens, 1.0) - float(exclude_current)
        return_T = return_T / count_T.clamp(min=1.0)
    return return_T.where(mask_T, 0.0).to(dtype)


def _constant(values_N: Tensor, like_N: Tensor, mask_N: Tensor | None) -> Tensor:
    values_N = values_N.detach().to(like_N.dtype)
    return values_N if mask_N is None else values_N.where(mask_N, 0.0)


def _clip(
    ratio_N: Tensor, advantage_N: Tensor, low: float | None, high: float | None, dual: float | None
) -> tuple[Tensor, Tensor]:
    """The ratio within the bounds that its advantage calls for, and whether a bound took its place."""
    upper = math.inf if high is None else 1.0 + high
    lower = -math.inf if low is None else 1.0 - low
    dual = math.inf if dual is None else dual
    positive_N = advantage_N > 0.0
    bound_N = ratio_N.clamp(max=upper).where(positive_N, ratio_N.clamp(min=lower, max=dual))
    # Both comparisons are False for NaN, which so stays in the differentiable branch and shows in the gradient.
    outside_N = (ratio_N > bound_N) | (ratio_N < bound_N)
    return bound_N, outside_N & (advantage_N != 0.0)


def _check_bounds(
    clip_low: float | None, clip_high: float | None, dual_clip: float | None, importance_cap: float | None
) -> None:
    if clip_low is not None and not 0.0 <= clip_low <= 1.0:
        raise ValueError(f"clip_low must lie in [0, 1] (or be None: no bound), not {clip_low}")
    if clip_high is not None and not 0.0 <= clip_high < math.inf:
        raise ValueError(f"clip_high must be finite and not negative (or None: no bound), not {clip_high}")
    if dual_clip is not None and not 1.0 < dual_clip < math.inf:
        raise ValueError(f"dual_clip must be finite and greater than 1 (or None: off), not {dual_clip}")
    if importance_cap is not None and not 0.0 < importance_cap < math.inf:
        raise ValueError(f"importance_cap must be finite and positive (or None: off), not {importance_cap}")


def _check_discount(discount: float) -> None:
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"discount must lie in [0, 1], not {discount}")


def _check_shapes(first: Tensor, others: dict[str, Tensor | None]) -> None:
    if first.dim() != 1:
        raise ValueError(f"per-token values have one dimension, not the shape {tuple(first.shape)}")
    for name, other in others.items():
        if other is not None and other.shape != first.shape:
            raise ValueError(f"{name} has shape {tuple(other.shape)} for {first.shape[0]} tokens")
