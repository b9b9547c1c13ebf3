"""The same functions, dense, in float64, slow and plain: what all others are tested against.

Nothing here is sharded, blocked or clever. Gradients come from autograd.
"""

from megatron_opd.objectives.reference.divergence import (
    linear_divergence,
    topk_divergence,
    vocab_parallel_divergence,
)
from megatron_opd.objectives.reference.loss import loss
from megatron_opd.objectives.reference.policy_gradient import (
    aopd_gate,
    discounted_returns,
    policy_gradient,
    shaped_reward,
    teacher_entropy_gate,
)
from megatron_opd.objectives.reference.token_weights import token_weights

__all__ = [
    "aopd_gate",
    "discounted_returns",
    "linear_divergence",
    "loss",
    "policy_gradient",
    "shaped_reward",
    "teacher_entropy_gate",
    "token_weights",
    "topk_divergence",
    "vocab_parallel_divergence",
]
