"""One pass of the objective over an update's microbatches, with or without gradients.

The loss of an update is the sum over ALL its unmasked response tokens (microbatches, data-parallel ranks) of
weight * divergence, divided by their number M: never a mean of means. megatron-core divides the accumulated gradient
by T_all, the tokens it routed, so the loss function returns sum * T_all / M.

Shapes: T tokens of a microbatch, N its loss positions, V padded vocabulary, TP tensor-parallel size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_opd.data.packing import Microbatch, count_loss_tokens
from megatron_opd.models.gpt import GPT, packed_forward
from megatron_opd.models.lm_head import logits_shard, select_positions
from megatron_opd.objectives import Objective
from megatron_opd.parallel.schedule import run_schedule
from megatron_opd.teacher.megatron import MegatronTeacher, TeacherPayload


@dataclass(frozen=True)
class UpdateScale:
    """How the sums of one update are normalised, known on every rank before the forward pass.

    `loss_tokens` is M, the unmasked response tokens; `routed_tokens` is T_all, all tokens incl. prompts and padding.
    """

    loss_tokens: int
    routed_tokens: int

    @classmethod
    def of(cls, packed: Sequence[Sequence[Microbatch]]) -> "UpdateScale":
        """Counted over the microbatches of all data-parallel ranks (every rank packs the same rollouts)."""
        everything = [microbatch for rank in packed for microbatch in rank]
        loss_tokens = count_loss_tokens(everything)
        assert loss_tokens > 0, "every response has at least one token"
        return cls(loss_tokens, sum(m.tokens_T.numel() for m in everything))

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Per-token means of an update's sums."""
        return {name: value / self.loss_tokens for name, value in sums.items()}


@dataclass(frozen=True)
class ObjectivePass:
    """The objective, the teacher and the student's model and groups: what a pass over microbatches needs."""

    gpt: GPT
    teacher: MegatronTeacher
    objective: Objective
    vocab_size: int  # real vocabulary common to student and teacher
    groups: ProcessGroupCollection
    check: bool = False  # judge the logits, and name the tensor on every rank when they are not finite

    def run(
        self,
        model: torch.nn.Module,
        microbatches: Sequence[Microbatch],
        payloads: Sequence[TeacherPayload | None],
        scale: UpdateScale,
        *,
        forward_only: bool = False,
    ) -> dict[str, float]:
        """Sums over the whole update of the objective's statistics, the same on every rank.

        Unless `forward_only`, the gradients of the update's mean loss are accumulated, reduced and normalised in
        `model` (the DDP wrapper). Collectives besides those of megatron's schedule: 1 all-gather a microbatch inside
        the divergence, 2 all-reduces of the sums.
        """

        def forward_step(inputs: Any, stage: torch.nn.Module) -> tuple[Tensor, Any]:
            microbatch, payload = next(inputs)
            hidden_T1H = packed_forward(
                stage, microbatch.tokens_T, microbatch.position_ids_T, microbatch.cu_seqlens
            )

            def loss_func(output_T1H: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                loss_sum, sums = self._loss(output_T1H, microbatch, payload)
                tokens = torch.tensor(microbatch.tokens_T.numel(), dtype=torch.int, device=output_T1H.device)
                return loss_sum * (scale.routed_tokens / scale.loss_tokens), tokens, sums

            return hidden_T1H, loss_func

        logs = run_schedule(
            forward_step,
            zip(microbatches, payloads, strict=True),
            model,
            self.groups,
            count=len(microbatches),
            forward_only=forward_only,
        )
        return self._reduce(logs)

    def _loss(
        self, hidden_T1H: Tensor, microbatch: Microbatch, payload: TeacherPayload
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss sum of one microbatch and its statistics, on the last stage; logits exist at response tokens only."""
        positions_N = microbatch.mask_T.nonzero()[:, 0]
        hidden_NH = select_positions(
            hidden_T1H,
            positions_N,
            group=self.groups.tp,
            sequence_parallel=self.gpt.config.sequence_parallel,
        )
        stats = self.objective.token_stats(
            logits_shard(hidden_NH, self.gpt.head_weight),
            self.teacher.logits_shard(payload),
            microbatch.targets_T[positions_N],
            vocab_size=self.vocab_size,
            group=self.groups.tp,
            check=self.check,
            inplace_backward=True,  # nothing else reads the student's logits
        )
        loss_sum, sums = self.objective.loss(stats, positions_N, microbatch.mask_T, microbatch.cu_seqlens)
        assert stats.student_logprob is not None
        mismatch_N = stats.student_logprob.detach() - microbatch.rollout_logprobs_T[positions_N]
        return loss_sum, {**sums, "logprob_mismatch": mismatch_N.abs().sum()}

    def _reduce(self, logs: list[dict[str, Tensor]]) -> dict[str, float]:
        """Sum the microbatches' statistics over pipeline stages (only the last has any) and data-parallel ranks."""
        names = ("loss", self.objective.divergence, "weight", "log_gap", "abs_log_gap", "logprob_mismatch")
        total = torch.zeros(len(names), dtype=torch.float64, device=next(self.gpt.parameters()).device)
        for sums in logs:
            total += torch.stack([sums[name].double() for name in names])
        for group in (self.groups.pp, self.groups.dp_cp):
            dist.all_reduce(total, group=group)
        return dict(zip(names, total.tolist(), strict=True))
