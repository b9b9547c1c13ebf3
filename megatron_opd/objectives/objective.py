"""The loss of a microbatch: a divergence per token, times its token weight, summed.

Shape suffixes: T positions of the packed microbatch, N the positions among them that enter the loss, V
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_opd.objectives.divergence import DIVERGENCE_KINDS, vocab_parallel_divergence
from megatron_opd.objectives.stats import TokenStats
from megatron_opd.objectives.token_weights import TOKEN_WEIGHT_KINDS, token_weights


@dataclass(frozen=True)
class Objective:
    """Which divergence, and how tokens are weighted. ValueError for values that do not exist."""

    divergence: str = "reverse_kl"
    token_weight: str = "uniform"
    gamma: float = 0.5
    unit_mean: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCE_KINDS:
            raise ValueError(
                f"unknown divergence {self.divergence!r}; supported: {', '.join(DIVERGENCE_KINDS)}"
            )
        if self.token_weight not in TOKEN_WEIGHT_KINDS:
            raise ValueError(
                f"unknown token weight {self.token_weight!r}; supported: {', '.join(TOKEN_WEIGHT_KINDS)}"
            )
        if not self.gamma >= 0.0:
            raise ValueError(f"gamma must not be negative: {self.gamma}")
        if not self.temperature > 0.0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")

    def token_stats(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        targets_N: Tensor,
        *,
        vocab_size: int | None = None,
        group: dist.ProcessGroup | None = None,
        check: bool = False,
        inplace_backward: bool = False,
    ) -> TokenStats:
        """`vocab_parallel_divergence` of the logits shards [N, V/TP] with this objective's settings."""
        return vocab_parallel_divergence(
            student_logits,
            teacher_logits,
            kind=self.divergence,
            targets=targets_N,
            temperature=self.temperature,
            vocab_size=vocab_size,
            group=group,
            check=check,
            inplace_backward=inplace_backward,
        )

    def loss(
        self, stats: TokenStats, positions_N: Tensor, mask_T: Tensor, cu_seqlens: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed loss, and sums for the metrics.

        Args:
            stats: of N positions, with targets.
            positions_N: [N] int64, where those positions lie in the packed microbatch, each once. They
                contain every position where mask_T is True; others count nothing.
            mask_T: [T] bool, the positions that predict a response token.
            cu_seqlens: [S + 1], the responses' offsets in the packed microbatch; its last entry is T.

        Returns:
            sum_t mask_t * w_t * divergence_t, a scalar with a gradient, not divided by anything: the caller
            scales it by 1 / M with M the unmasked response tokens of the whole optimizer update. And detached
            float64 scalars, each summed over the unmasked tokens: "tokens" (their count), "loss", "weight",
            "log_gap", "abs_log_gap" and, under its own name, the unweighted divergence.
        """
        mask_N = mask_T[positions_N]
        log_gap_N = stats.log_gap
        log_gap_T = log_gap_N.new_zeros(mask_T.shape).index_copy(0, positions_N, log_gap_N)
        weights_T = token_weights(
            log_gap_T, mask_T, cu_seqlens, kind=self.token_weight, gamma=self.gamma, unit_mean=self.unit_mean
        )
        weights_N = weights_T[positions_N]
        divergence_N = stats.divergence.where(mask_N, 0.0)
        loss = (weights_N * divergence_N).sum()
        log_gap_N = log_gap_N.where(mask_N, 0.0).double()
        sums = {
            "tokens": mask_N.double().sum(),
            "loss": (weights_N.double() * divergence_N.detach().double()).sum(),
            self.divergence: divergence_N.detach().double().sum(),
            "weight": weights_N.double().sum(),
            "log_gap": log_gap_N.sum(),
            "abs_log_gap": log_gap_N.abs().sum(),
        }
        return loss, sums
