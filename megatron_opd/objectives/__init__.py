"""The mathematics of on-policy distillation: exact, sharded, tested against `reference`.

Here live the divergences of student and teacher (`divergence`, `linear_divergence`, `topk`) over one core
(`vocab_parallel` with `shard_statistics`, `merge`, `candidates`, `shard_gradient`, `logits`, `kept_ids`), what they
return (`stats`), what a teacher may say instead of logits (`served`), the sampled-token estimator
(`policy_gradient`, `shaping`), the `gates`, the token weights and their prefix sums (`token_weights`, `scan`,
`context_parallel`), the loss they make together (`objective`, with the table of what goes together in `combinations`)
and the slow dense float64 truth (`reference`). This folder imports torch and `megatron_opd.kernels` only: nothing of
Megatron, of the configuration or of any other part, so that it can be lifted out. README.md tells which objective is
for what.
"""

from megatron_opd.objectives import reference
from megatron_opd.objectives.context_parallel import gather_sequence, zigzag_positions
from megatron_opd.objectives.divergence import vocab_parallel_divergence
from megatron_opd.objectives.gates import Gate, aopd_gate, teacher_entropy_gate
from megatron_opd.objectives.kept_ids import KeptIds
from megatron_opd.objectives.linear_divergence import linear_divergence
from megatron_opd.objectives.logits import LinearLogits
from megatron_opd.objectives.objective import Objective
from megatron_opd.objectives.policy_gradient import PolicyGradient, discounted_returns, policy_gradient
from megatron_opd.objectives.scan import SegmentScan, discounted_suffix_sums, segmented_prefix_sums
from megatron_opd.objectives.served import ServedLogprobs, served_logprobs
from megatron_opd.objectives.shaping import Shaping, shaped_reward
from megatron_opd.objectives.shard import DIVERGENCE_KINDS
from megatron_opd.objectives.stats import TokenStats
from megatron_opd.objectives.token_weights import TOKEN_WEIGHT_KINDS, TokenWeight, token_weights
from megatron_opd.objectives.topk import topk_divergence
from megatron_opd.objectives.vocab_parallel import likeliest, sampled_logprob

__all__ = [
    "DIVERGENCE_KINDS",
    "TOKEN_WEIGHT_KINDS",
    "Gate",
    "KeptIds",
    "LinearLogits",
    "Objective",
    "PolicyGradient",
    "SegmentScan",
    "ServedLogprobs",
    "Shaping",
    "TokenStats",
    "TokenWeight",
    "aopd_gate",
    "discounted_returns",
    "discounted_suffix_sums",
    "gather_sequence",
    "likeliest",
    "linear_divergence",
    "policy_gradient",
    "reference",
    "sampled_logprob",
    "segmented_prefix_sums",
    "served_logprobs",
    "shaped_reward",
    "teacher_entropy_gate",
    "token_weights",
    "topk_divergence",
    "vocab_parallel_divergence",
    "zigzag_positions",
]
