"""Policy gradient, returns, shaping and gates, one token after the other.

Shape suffixes: N tokens, T positions of a packed buffer.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from megatron_opd.objectives.policy_gradient import PolicyLoss


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
    """The loss of `objectives.policy_gradient` from its formula, float64."""
    losses, clipped, weights = [], [], []
    for t in range(len(student_logprob_N)):
        # Masked tokens are tokens of which every input is 0.
        kept = mask_N is None or bool(mask_N[t])
        logprob = student_logprob_N[t].double() if kept else torch.zeros((), dtype=torch.float64)
        advantage = float(advantage_N[t]) if kept else 0.0
        old = float(old_logprob_N[t]) if kept and old_logprob_N is not None else logprob.item()
        ratio = (logprob - old).exp()
        lowest = -math.inf if clip_low is None else 1.0 - clip_low
        highest = math.inf if clip_high is None else 1.0 + clip_high
        limited = min(max(ratio.item(), lowest), highest)
        surrogate = ratio * advantage
        if limited * advantage < surrogate.item():
            surrogate = torch.tensor(limited * advantage, dtype=torch.float64)
        if advantage < 0.0 and dual_clip is not None and dual_clip * advantage > surrogate.item():
            surrogate = torch.tensor(dual_clip * advantage, dtype=torch.float64)
        weight = 1.0
        if rollout_logprob_N is not None and importance_cap is not None:
            rollout = float(rollout_logprob_N[t]) if kept else 0.0
            weight = min(math.exp(old - rollout), importance_cap)
        losses.append(-weight * surrogate)
        clipped.append(surrogate.item() != ratio.item() * advantage)
        weights.append(weight)
    loss_N = torch.stack(losses) if losses else student_logprob_N.double()
    return PolicyLoss(
        loss_N, torch.tensor(clipped, dtype=torch.bool), torch.tensor(weights, dtype=torch.float64)
    )


def discounted_returns(
    reward_T: Tensor,
    mask_T: Tensor,
    cu_seqlens: Tensor,
    *,
    discount: float,
    exclude_current: bool = False,
    length_normalized: bool = False,
) -> Tensor:
    """The returns of `objectives.discounted_returns`, float64: a double loop over each response."""
    return_T = torch.zeros(len(reward_T), dtype=torch.float64)
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        tokens = [t for t in range(start, stop) if mask_T[t]]
        for t in tokens:
            later = [k for k in tokens if k > t or (k == t and not exclude_current)]
            total = sum(discount ** (k - t) * float(reward_T[k]) for k in later)
            return_T[t] = total / len(later) if length_normalized and later else total
    return return_T


def shaped_reward(
    teacher_logprob_N: Tensor,
    old_logprob_N: Tensor,
    *,
    reference_logprob_N: Tensor | None = None,
    reference_weight: float = 1.0,
    clip: float | None = None,
    power: float | None = None,
) -> Tensor:
    """The reward of `objectives.shaped_reward` as the papers write it, float64."""
    rewards = []
    for t, (teacher, old) in enumerate(zip(teacher_logprob_N.tolist(), old_logprob_N.tolist(), strict=True)):
        if power is not None:
            reward = math.exp(teacher) ** power - math.exp(old) ** power
        elif reference_logprob_N is not None:
            base = float(reference_logprob_N[t])
            reward = -((old - base) - reference_weight * (teacher - base))
        else:
            reward = teacher - old
        rewards.append(reward if clip is None else min(max(reward, -clip), clip))
    return torch.tensor(rewards, dtype=torch.float64)


def aopd_gate(teacher_logprob_N: Tensor, old_logprob_N: Tensor, tau: float) -> Tensor:
    """The gate of `objectives.aopd_gate`."""
    pairs = zip(teacher_logprob_N.tolist(), old_logprob_N.tolist(), strict=True)
    gates = [tau > -1.0 and math.exp(teacher) - math.exp(old) <= tau for teacher, old in pairs]
    return torch.tensor(gates, dtype=torch.bool)


def teacher_entropy_gate(teacher_entropy_N: Tensor, threshold: float) -> Tensor:
    """The gate of `objectives.teacher_entropy_gate`."""
    return torch.tensor([entropy > threshold for entropy in teacher_entropy_N.tolist()], dtype=torch.bool)
