"""The colocated Megatron teacher: forward-only, it hands over final-norm hidden states, not logits.

Hidden states are 50 to 75 times smaller than logits, and whoever holds a shard of the teacher's LM head projects them
where the loss is computed: layouts of teacher and student stay independent. Here the teacher lives on the student's
ranks with the student's layout, and both heads are padded to the same number of rows, so that the shards cover the
same token ids.

Shapes: T tokens of a microbatch, N its loss positions, D the teacher's hidden size, V padded vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_opd.data.packing import Microbatch
from megatron_opd.models.gpt import GPT, packed_forward
from megatron_opd.models.lm_head import logits_shard, select_positions
from megatron_opd.objectives import LinearLogits
from megatron_opd.parallel.schedule import run_schedule
from megatron_opd.teacher.host_weights import HostWeights
from megatron_opd.teacher.payload import HiddenStates, TeacherPayload


class MegatronTeacher:
    """A frozen model on the student's ranks, `chunks` of it on this one. It has no gradients and no optimizer.

    With `offload` its weights are in host memory but inside `resident()`, all except the LM head: the objective
    projects with it while the student trains.
    """

    def __init__(
        self, chunks: Sequence[GPT], groups: ProcessGroupCollection, *, offload: bool = False
    ) -> None:
        self.chunks = [chunk.eval().requires_grad_(False) for chunk in chunks]
        self.groups = groups
        self._offloaded: HostWeights | None = None
        if offload:
            head = chunks[-1].head_weight if chunks[-1].post_process else None
            weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
            moved = [weight for weight in weights if weight is not head]
            self._offloaded = HostWeights(moved, weights[0].device)

    def resident(self) -> AbstractContextManager[None]:
        """Inside, the whole model can be run."""
        return nullcontext() if self._offloaded is None else self._offloaded.on_device()

    def score(self, microbatches: Sequence[Microbatch]) -> list[HiddenStates | None]:
        """One payload a microbatch on the last pipeline stage, None on the others.

        Collectives: those of a forward pass in the teacher's layout. Memory kept: N * D numbers.
        """
        with self.resident():
            hidden = final_hidden_states(self.chunks, microbatches, self.groups)
        return [None if hidden_ND is None else HiddenStates(hidden_ND) for hidden_ND in hidden]

    def distribution(self, payload: TeacherPayload, *, chunked: bool) -> Tensor | LinearLogits:
        """The teacher's logits [N, V/TP] for the token ids of this rank's shard, computed here or, `chunked`, later.

        Last stage only, no collectives.
        """
        assert isinstance(payload, HiddenStates)
        if chunked:
            return LinearLogits(payload.hidden_ND, self.chunks[-1].head_weight)
        with torch.no_grad():
            return logits_shard(payload.hidden_ND, self.chunks[-1].head_weight, self.groups.tp)


def final_hidden_states(
    chunks: Sequence[torch.nn.Module], microbatches: Sequence[Microbatch], groups: ProcessGroupCollection
) -> list[Tensor | None]:
    """Final-norm hidden states [N, D] at the loss positions of each microbatch, None but on the last stage.

    A forward pass without gradients through this rank's `chunks`, bare or in DDP wrappers.
    """
    sharded = get_model_config(chunks[0]).sequence_parallel

    def forward_step(inputs: Any, chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        microbatch: Microbatch = next(inputs)
        hidden_T1D = packed_forward(
            chunk, microbatch.tokens_T, microbatch.position_ids_T, microbatch.cu_seqlens
        )

        def at_loss_positions(output_T1D: Tensor, non_loss_data: bool) -> Tensor:
            assert non_loss_data
            positions_N = microbatch.mask_T.nonzero()[:, 0]
            return select_positions(output_T1D, positions_N, group=groups.tp, sequence_parallel=sharded)

        return hidden_T1D, at_loss_positions

    collected: list[Tensor | None] = run_schedule(
        forward_step,
        microbatches,
        chunks,
        groups,
        forward_only=True,
        collect=True,
    )
    return collected or [None] * len(microbatches)
