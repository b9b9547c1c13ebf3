"""The loss of a microbatch: one or two estimators per token, gated, times the token weight, summed.

    loss = sum_t mask_t * w_t * estimator_t

where the estimator is a divergence (over the whole vocabulary or a top-K support), a policy gradient, or both
with a gate between them. Everything that depends on log-gaps (weights, gates, rewards, ratios) uses the student
that wrote the responses: the current one, detached, or stored old log-probabilities.

Shape suffixes: T positions of the packed microbatch (this context-parallel rank's part of it), N the positions
among them that enter the loss, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.objectives.combinations import check_combination
from megatron_opd.objectives.context_parallel import gather_sequence, zigzag_positions
from megatron_opd.objectives.divergence import full_support_stats
from megatron_opd.objectives.gates import Gate, aopd_gate, teacher_entropy_gate
from megatron_opd.objectives.kept_ids import KeptIds
from megatron_opd.objectives.logits import LinearLogits
from megatron_opd.objectives.policy_gradient import PolicyGradient, discounted_returns, policy_gradient
from megatron_opd.objectives.served import ServedLogprobs, sampled_stats, without_scale
from megatron_opd.objectives.shaping import Shaping, shaped_reward
from megatron_opd.objectives.shard import Request
from megatron_opd.objectives.stats import TokenStats
from megatron_opd.objectives.token_weights import TokenWeight, token_weights
from megatron_opd.objectives.topk import topk_divergence


@dataclass(frozen=True)
class Objective:
    """What is minimised. ValueError, naming the field, for values and combinations that make no sense.

    divergence: "reverse_kl", "forward_kl", "jsd" (with beta) or "policy_gradient" on the sampled token.
    support, k, remainder: of `topk_divergence`; "full" is the whole vocabulary. With policy_gradient they belong
        to the gate's divergence.
    gate: which tokens have the top-K divergence instead of, or besides, the policy gradient.
    temperature: divides the logits of both models; the rollouts were drawn at it.
    kept_ids_only: both models are restricted, token by token, to the ids that top-p or top-k left the sampler, and
        renormalised there, before anything else is computed: so the student is the policy that drew the tokens.
    served_at: the teacher gives log-probabilities (`ServedLogprobs`) instead of logits, measured at this temperature;
        None: it gives logits.
    """

    divergence: str = "reverse_kl"
    beta: float = 0.5
    support: str = "full"
    k: int = 32
    remainder: str = "renormalize"
    gate: Gate = field(default_factory=Gate)
    policy: PolicyGradient = field(default_factory=PolicyGradient)
    shaping: Shaping = field(default_factory=Shaping)
    token_weight: TokenWeight = field(default_factory=TokenWeight)
    temperature: float = 1.0
    kept_ids_only: bool = False
    served_at: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0.0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")
        check_combination(self)

    @property
    def served(self) -> bool:
        """Whether the teacher gives log-probabilities instead of logits."""
        return self.served_at is not None

    @property
    def sampled(self) -> bool:
        """Whether the sampled token's policy gradient is part of the loss."""
        return self.divergence == "policy_gradient"

    @property
    def reads_old_logprobs(self) -> bool:
        """Whether the loss of a later update differs for the student that wrote the responses and the current one."""
        return self.sampled or self.token_weight.kind in ("cumulative_share", "prefix_ratio")

    @property
    def knows_gaps(self) -> bool:
        """Whether the teacher's log-probs of the sampled tokens are known: those of another temperature are not."""
        return self.served_at in (None, self.temperature)

    @property
    def value_names(self) -> tuple[str, ...]:
        """The values of each token that `loss` returns, in order."""
        distance = "reverse_kl_sampled" if self.served else "reverse_kl"
        names: tuple[str, ...] = ("loss", distance, "weight", "log_gap", "abs_log_gap")
        if not self.knows_gaps:
            names = ("loss", "weight")
        names += ("student_logprob", "student_entropy", *([] if self.served else ["teacher_entropy"]))
        if self.sampled:
            names += ("clipped", "importance")
        if self.gate.kind != "none":
            names += ("gated",)
        if self.support != "full":
            names += ("topk_divergence", "student_mass", *(["teacher_mass"] if self.knows_gaps else []))
        elif self.divergence in ("forward_kl", "jsd"):
            names += (self.divergence,)
        return names

    def token_stats(
        self,
        student: Tensor | LinearLogits,
        teacher: Tensor | LinearLogits | ServedLogprobs,
        targets_N: Tensor,
        *,
        rollout_logprob_N: Tensor | None = None,
        vocab_size: int | None = None,
        group: dist.ProcessGroup | None = None,
        check: bool = False,
        inplace_backward: bool = False,
        chunk_size: int | None = None,
        kept: KeptIds | None = None,
    ) -> TokenStats:
        """What the loss needs to know of each token, from the logits shards [N, V/TP] (given, or in chunks).

        A served teacher gives its log-probabilities instead, which `check` judges too.
        One all-gather forward over `group` (two for jsd); see `vocab_parallel_divergence` and
        `linear_divergence` for the rest. rollout_logprob_N is read by the remainder sampled_tail only, `kept`, the
        ids that sampling kept at each token, with kept_ids_only only; then every statistic is of the kept ids.
        """
        assert kept is not None or not self.kept_ids_only
        kept = kept if self.kept_ids_only else None
        served = teacher if isinstance(teacher, ServedLogprobs) else None
        assert (served is not None) == self.served
        if served is not None and self.served_at is not None:
            teacher = served = served.scaled(self.served_at / self.temperature)
            if check:
                served.raise_if_nan()
        if self.support != "full":
            stats = topk_divergence(
                student,
                teacher if not isinstance(teacher, ServedLogprobs) else teacher.support(),
                k=None if served else self.k,
                kind=self.gate.divergence if self.sampled else self.divergence,
                support=self.support,
                remainder=self.remainder,
                targets=targets_N,
                teacher_logprob=None if served is None else served.logprob,
                rollout_logprob=None if self.policy.importance_cap is None else rollout_logprob_N,
                importance_cap=self.policy.importance_cap,
                entropies=True,
                temperature=self.temperature,
                vocab_size=vocab_size,
                group=group,
                check=check,
                inplace_backward=inplace_backward,
                chunk_size=chunk_size,
                kept=kept,
            )
            return stats if self.knows_gaps else without_scale(stats)
        request = Request(
            kind="reverse_kl" if self.sampled else self.divergence,
            beta=self.beta,
            temperature=self.temperature,
            vocab_size=vocab_size,
            group=group,
            entropies=True,
            check=check,
            inplace_backward=inplace_backward,
            chunk_size=chunk_size,
            kept=kept,
        )
        if isinstance(teacher, ServedLogprobs):
            return sampled_stats(student, teacher, targets_N, request)
        return full_support_stats(student, teacher, targets_N, request)

    def loss(
        self,
        stats: TokenStats,
        positions_N: Tensor,
        mask_T: Tensor,
        cu_seqlens: Tensor,
        *,
        rollout_logprob_N: Tensor | None = None,
        old_logprob_N: Tensor | None = None,
        reference_logprob_N: Tensor | None = None,
        progress: float = 0.0,
        group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed loss, and what the metrics say of each token.

        Args:
            stats: of N positions, from `token_stats`.
            positions_N: [N] int64, where those positions lie in the packed microbatch, each once. They
                contain every position where mask_T is True; others count nothing.
            mask_T: [T] bool, the positions that predict a response token which enters the loss.
            cu_seqlens: [S + 1], the responses' offsets in the whole packed microbatch.
            rollout_logprob_N: [N] log-probabilities under the policy that drew the tokens, after temperature, top-p
                and top-k; None: taken as exact.
            old_logprob_N: [N] under the student before the first update on these rollouts; None: this is it.
            reference_logprob_N: [N] under the reference policy, where shaping.reference_weight is not 1.
            progress: how much of the training is done, 0 to 1; read by the curriculum weight.
            group: the context-parallel group; T is then this rank's zigzag share. At most one all-gather of 3 T
                numbers, for weights and returns together; none where neither looks beyond its token.

        Returns:
            sum_t mask_t * w_t * estimator_t, a scalar with a gradient, not divided by anything: the caller
            scales it by 1 / M with M the unmasked response tokens of the whole optimizer update. And under
            `value_names` [N] each, float64 and detached, 0 where masked.
        """
        assert stats.student_logprob is not None
        mask_N = mask_T[positions_N]
        old_N = stats.student_logprob.detach() if old_logprob_N is None else old_logprob_N
        # Where the gaps are not known nothing reads them.
        teacher_N = old_N if stats.teacher_logprob is None else stats.teacher_logprob
        gap_N = (teacher_N - old_N).where(mask_N, 0.0)
        reward_N = gap_N
        if self.sampled:
            shaping = vars(self.shaping)
            reward_N = shaped_reward(
                teacher_N, old_N, reference_logprob_N=reference_logprob_N, **shaping
            ).where(mask_N, 0.0)
        weights_N, returns_N = self._along_responses(
            torch.stack([gap_N, reward_N]), positions_N, mask_T, cu_seqlens, progress, group
        )
        estimator_N, values = self._estimator(
            stats, returns_N, mask_N, old_N, ratio=old_logprob_N is not None, rollout_N=rollout_logprob_N
        )
        values |= {
            "loss": weights_N.double() * estimator_N.detach().double(),
            "reverse_kl": stats.reverse_kl,
            "reverse_kl_sampled": -gap_N,
            "weight": weights_N,
            "log_gap": gap_N,
            "abs_log_gap": gap_N.abs(),
            "student_logprob": old_N,
            "student_entropy": stats.student_entropy,
            "teacher_entropy": stats.teacher_entropy,
        }
        return (weights_N * estimator_N).sum(), {
            name: _masked(values[name], mask_N) for name in self.value_names
        }

    def _along_responses(
        self,
        values_2N: Tensor,
        positions_N: Tensor,
        mask_T: Tensor,
        cu_seqlens: Tensor,
        progress: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        """Token weights and returns [N] from log-gaps and rewards: what looks at a whole response, in one gather."""
        if self.token_weight.kind == "uniform" and not self._has_returns:
            return mask_T[positions_N].to(values_2N.dtype), values_2N[1]
        local_2T = values_2N.new_zeros(2, mask_T.shape[0]).index_copy(1, positions_N, values_2N)
        rows = torch.cat([local_2T, mask_T.to(local_2T.dtype)[None]])
        gap_T, reward_T, whole_mask_T = gather_sequence(rows, cu_seqlens, group)
        whole_mask_T = whole_mask_T != 0
        weights_T = token_weights(
            gap_T, whole_mask_T, cu_seqlens, progress=progress, **vars(self.token_weight)
        )
        if self._has_returns:
            reward_T = discounted_returns(
                reward_T,
                whole_mask_T,
                cu_seqlens,
                discount=self.policy.discount,
                exclude_current=self.policy.exact_step,
                length_normalized=self.policy.length_normalized,
            )
        if group is not None:
            mine_T = zigzag_positions(cu_seqlens, dist.get_rank(group), dist.get_world_size(group))
            positions_N = mine_T.to(positions_N.device)[positions_N]
        return weights_T[positions_N], reward_T[positions_N]

    @property
    def _has_returns(self) -> bool:
        return self.sampled and self.policy.discount > 0.0

    def _estimator(
        self,
        stats: TokenStats,
        returns_N: Tensor,
        mask_N: Tensor,
        old_N: Tensor,
        *,
        ratio: bool,
        rollout_N: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The loss of each token before its weight, 0 where masked; and what the metrics say of it."""
        divergence_N = stats.divergence.where(mask_N, 0.0)
        values: dict[str, Tensor | None] = {
            self.divergence: divergence_N,
            "topk_divergence": divergence_N,
            "student_mass": stats.student_mass,
            "teacher_mass": stats.teacher_mass,
        }
        if not self.sampled:
            return divergence_N, values
        assert stats.student_logprob is not None
        settings = self.policy
        if settings.baseline == "reverse_kl":
            assert stats.reverse_kl is not None
            returns_N = returns_N + stats.reverse_kl
        policy = policy_gradient(
            stats.student_logprob,
            returns_N,
            old_logprob_N=old_N if ratio else None,
            rollout_logprob_N=rollout_N,
            mask_N=mask_N,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            dual_clip=settings.dual_clip,
            importance_cap=settings.importance_cap,
        )
        values |= {"clipped": policy.clipped_N, "importance": policy.importance_N}
        if settings.exact_step:
            return policy.loss_N + divergence_N, values
        if self.gate.kind == "none":
            return policy.loss_N, values
        gate_N = self._gate(stats, old_N) & mask_N
        values["gated"] = gate_N
        gated_N = (self.gate.coefficient * divergence_N).where(gate_N, 0.0)
        if self.gate.kind == "teacher_entropy":
            return policy.loss_N + gated_N, values
        values["clipped"] = policy.clipped_N & ~gate_N
        return policy.loss_N.where(~gate_N, 0.0) + gated_N, values

    def _gate(self, stats: TokenStats, old_N: Tensor) -> Tensor:
        assert stats.teacher_logprob is not None
        if self.gate.kind == "aopd":
            return aopd_gate(stats.teacher_logprob, old_N, self.gate.tau)
        assert stats.teacher_entropy is not None
        return teacher_entropy_gate(stats.teacher_entropy, self.gate.threshold)


def _masked(values_N: Tensor | None, mask_N: Tensor) -> Tensor:
    """Detached, float64, 0 where masked."""
    assert values_N is not None
    return values_N.detach().double().where(mask_N, 0.0)
