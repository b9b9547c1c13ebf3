"""Gates: the tokens whose loss is, or also is, a top-K divergence instead of the policy gradient alone.

Shape suffix: N tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GATE_KINDS = ("none", "aopd", "teacher_entropy")
GATE_DIVERGENCES = ("forward_kl", "reverse_kl")


@dataclass(frozen=True)
class Gate:
    """Settings of the gate; ValueError that names the field for a bad value.

    kind: "aopd" (arXiv 2605.06387, Eq. 9-10): G * coefficient * top-K divergence + (1 - G) * policy gradient,
        with G from `aopd_gate`. "teacher_entropy" (EOPD, arXiv 2603.07079): policy gradient + G * coefficient
        * top-K divergence, with G from `teacher_entropy_gate`.
    tau: aopd's bound on p_t - p_s, in [-1, 1].
    threshold: teacher_entropy's bound, in nats.
    coefficient: scales the top-K divergence.
    divergence: which one it is.
    """

    kind: str = "none"
    tau: float = 0.0
    threshold: float = 0.8
    coefficient: float = 1.0
    divergence: str = "forward_kl"

    def __post_init__(self) -> None:
        if self.kind not in GATE_KINDS:
            raise ValueError(f"unknown gate kind {self.kind!r}; supported: {', '.join(GATE_KINDS)}")
        if not -1.0 <= self.tau <= 1.0:
            raise ValueError(f"tau must lie in [-1, 1], not {self.tau}")
        if not 0.0 <= self.threshold < math.inf:
            raise ValueError(f"threshold must be finite and not negative, not {self.threshold}")
        if not 0.0 <= self.coefficient < math.inf:
            raise ValueError(f"coefficient must be finite and not negative, not {self.coefficient}")
        if self.divergence not in GATE_DIVERGENCES:
            raise ValueError(
                f"unknown gate divergence {self.divergence!r}; supported: {', '.join(GATE_DIVERGENCES)}"
            )


def aopd_gate(teacher_logprob_N: Tensor, old_logprob_N: Tensor, tau: float) -> Tensor:
    """Where p_t(y) - p_s(y) <= tau for the sampled token, bool [N], from log-probabilities [N].

    AOPD, arXiv 2605.06387, Eq. 9; p_s is the student that wrote the response. tau = 0 gates the tokens that
    the teacher finds no likelier than the student (the authors' code leaves out equal ones). tau >= 1 gates
    every token, whatever rounding makes of the probabilities, and tau <= -1 gates none, not even p_s = 1 with
    p_t = 0: AOPD is then top-K divergence everywhere or policy gradient everywhere. A NaN between these two
    is not gated.
    """
    if abs(tau) >= 1.0:
        return torch.full_like(teacher_logprob_N, tau > 0.0, dtype=torch.bool)
    return teacher_logprob_N.detach().exp() - old_logprob_N.detach().exp() <= tau


def teacher_entropy_gate(teacher_entropy_N: Tensor, threshold: float) -> Tensor:
    """Where the teacher's entropy [N], in nats, exceeds the threshold: bool [N] (EOPD, arXiv 2603.07079)."""
    return teacher_entropy_N.detach() > threshold
