"""The mathematics of on-policy distillation: exact, sharded, tested against `reference`.

Here live the divergence of student and teacher logits shards (`divergence`), what it returns (`stats`), the
token weights and their prefix sums (`token_weights`, `scan`), the loss they make together (`objective`) and
the slow dense float64 truth (`reference`). This folder imports torch and `megatron_opd.kernels` only: nothing
of Megatron, of the configuration or of any other part, so that it can be lifted out.
"""

from megatron_opd.objectives import reference
from megatron_opd.objectives.divergence import DIVERGENCE_KINDS, vocab_parallel_divergence
from megatron_opd.objectives.objective import Objective
from megatron_opd.objectives.scan import SegmentScan, segmented_prefix_sums
from megatron_opd.objectives.stats import TokenStats
from megatron_opd.objectives.token_weights import TOKEN_WEIGHT_KINDS, token_weights

__all__ = [
    "DIVERGENCE_KINDS",
    "TOKEN_WEIGHT_KINDS",
    "Objective",
    "SegmentScan",
    "TokenStats",
    "reference",
    "segmented_prefix_sums",
    "token_weights",
    "vocab_parallel_divergence",
]
