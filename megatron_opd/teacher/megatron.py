"""The colocated Megatron teacher: forward-only, it hands over final-norm hidden states, not logits.

Hidden states are 50 to 75 times smaller than logits, and whoever holds a shard of the teacher's LM head projects them
where the loss is computed: layouts of teacher and student stay independent. Here the teacher lives on the student's
ranks with the student's layout, and both heads are padded to the same number of rows, so that the shards cover the
same token ids.

Shapes: T tokens of a microbatch, N its loss positions, D the teacher's hidden size, V padded vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_opd.data.packing import Microbatch
from megatron_opd.models.gpt import GPT, packed_forward
from megatron_opd.models.lm_head import logits_shard, select_positions
from megatron_opd.objectives import LinearLogits
from megatron_opd.parallel.schedule import run_schedule
from megatron_opd.teacher.host_weights import HostWeights


@dataclass(frozen=True)
class TeacherPayload:
    """What the teacher says about one microbatch: its final-norm hidden states [N, D] at the loss positions."""

    hidden_ND: Tensor


class MegatronTeacher:
    """A frozen model on the student's ranks. It has no gradients and no optimizer.

    With `offload` its weights are in host memory but inside `resident()`, all except the LM head: the objective
    projects with it while the student trains.
    """

    def __init__(self, model: GPT, groups: ProcessGroupCollection, *, offload: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        self.groups = groups
        self._offloaded: HostWeights | None = None
        if offload:
            head = model.head_weight if model.post_process else None
            moved = [parameter for parameter in model.parameters() if parameter is not head]
            self._offloaded = HostWeights(moved, next(model.parameters()).device)

    def resident(self) -> AbstractContextManager[None]:
        """Inside, the whole model can be run."""
        return nullcontext() if self._offloaded is None else self._offloaded.on_device()

    def score(self, microbatches: Sequence[Microbatch]) -> list[TeacherPayload | None]:
        """One payload a microbatch on the last pipeline stage, None on the others.

        Collectives: those of a forward pass in the teacher's layout. Memory kept: N * D numbers.
        """
        with self.resident():
            hidden = final_hidden_states(self.model, self.model, microbatches, self.groups)
        return [None if hidden_ND is None else TeacherPayload(hidden_ND) for hidden_ND in hidden]

    def logits(self, payload: TeacherPayload, *, chunked: bool) -> Tensor | LinearLogits:
        """The teacher's logits [N, V/TP] for the token ids of this rank's shard, computed here or, `chunked`, later.

        Last stage only, no collectives.
        """
        if chunked:
            return LinearLogits(payload.hidden_ND, self.model.head_weight)
        with torch.no_grad():
            return logits_shard(payload.hidden_ND, self.model.head_weight, self.groups.tp)


def final_hidden_states(
    model: torch.nn.Module, gpt: GPT, microbatches: Sequence[Microbatch], groups: ProcessGroupCollection
) -> list[Tensor | None]:
    """Final-norm hidden states [N, D] at the loss positions of each microbatch, None but on the last stage.

    A forward pass without gradients through `model`, which is `gpt` or the DDP wrapper around it.
    """

    def forward_step(inputs: Any, stage: torch.nn.Module) -> tuple[Tensor, Any]:
        microbatch: Microbatch = next(inputs)
        hidden_T1D = packed_forward(
            stage, microbatch.tokens_T, microbatch.position_ids_T, microbatch.cu_seqlens
        )

        def at_loss_positions(output_T1D: Tensor, non_loss_data: bool) -> Tensor:
            assert non_loss_data
            positions_N = microbatch.mask_T.nonzero()[:, 0]
            sharded = gpt.config.sequence_parallel
            return select_positions(output_T1D, positions_N, group=groups.tp, sequence_parallel=sharded)

        return hidden_T1D, at_loss_positions

    collected: list[Tensor | None] = run_schedule(
        forward_step,
        microbatches,
        model,
        groups,
        count=len(microbatches),
        forward_only=True,
        collect=True,
    )
    return collected or [None] * len(microbatches)
