"""The reward of a sampled token: the log-gap to the teacher, and the published variants of it.

Shape suffix: N tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Shaping:
    """Settings of `shaped_reward`; ValueError that names the field for a bad value.

    reference_weight: the lambda of G-OPD/ExOPD (arXiv 2602.12125); 1 needs no reference policy.
    clip: the reward is clamped to [-clip, clip] (5 in MOPD, arXiv 2606.30406); None: not at all.
    power: the exponent of PowerOPD (arXiv 2606.17199); None: log-probabilities are compared. It does not
        combine with a reference_weight other than 1.
    """

    reference_weight: float = 1.0
    clip: float | None = None
    power: float | None = None

    def __post_init__(self) -> None:
        _check_settings(self.reference_weight, self.clip, self.power)


def shaped_reward(
    teacher_logprob_N: Tensor,
    old_logprob_N: Tensor,
    *,
    reference_logprob_N: Tensor | None = None,
    reference_weight: float = 1.0,
    clip: float | None = None,
    power: float | None = None,
) -> Tensor:
    """Reward of each sampled token from its log-probabilities [N]: [N], detached, in their dtype.

        default            log p_t - log p_s
        reference_weight   -[(log p_s - log p_ref) - reference_weight * (log p_t - log p_ref)]   (G-OPD/ExOPD)
        power              p_t^power - p_s^power                                                 (PowerOPD)
        clip               either of them, clamped to [-clip, clip]                              (MOPD)

    p_s is the student that wrote the response (the old log-probabilities in an update that is not the first).
    With reference_weight 1 the reference cancels and is not read. PowerOPD's reward lies in [-1, 1], has the
    sign of the log-gap, and divided by power tends to the log-gap as power tends to 0; it is computed from
    the difference of the logarithms, so that neither small powers nor small probabilities cost digits.

    ValueError: a setting out of range, a reference_weight other than 1 without reference_logprob_N or with
    power.
    """
    _check_settings(reference_weight, clip, power)
    teacher_N, old_N = teacher_logprob_N.detach(), old_logprob_N.detach()
    reward_N = teacher_N - old_N
    if power is not None:
        # p^power of the likelier one, times how much less the other is; rounding may leave log p above 0.
        scale_N = (power * teacher_N.maximum(old_N).clamp(max=0.0)).exp()
        reward_N = -reward_N.sign() * scale_N * (-power * reward_N.abs()).expm1()
    elif reference_weight != 1.0:
        if reference_logprob_N is None:
            raise ValueError(
                f"reference_weight {reference_weight} needs the reference policy's log-probabilities"
            )
        reward_N = reward_N + (reference_weight - 1.0) * (teacher_N - reference_logprob_N.detach())
    return reward_N if clip is None else reward_N.clamp(-clip, clip)


def _check_settings(reference_weight: float, clip: float | None, power: float | None) -> None:
    if not 0.0 <= reference_weight < math.inf:
        raise ValueError(f"reference_weight must be finite and not negative, not {reference_weight}")
    if clip is not None and not 0.0 < clip < math.inf:
        raise ValueError(f"clip must be finite and positive (or None: off), not {clip}")
    if power is not None and not 0.0 < power < math.inf:
        raise ValueError(f"power must be finite and positive (or None: off), not {power}")
    if power is not None and reference_weight != 1.0:
        raise ValueError(f"power does not combine with a reference_weight other than 1 ({reference_weight})")
