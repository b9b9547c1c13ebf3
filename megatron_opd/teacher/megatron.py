"""The colocated Megatron teacher: forward-only, by default it hands over final-norm hidden states, not logits.

Hidden states are 50 to 75 times smaller than logits, and whoever holds a shard of the teacher's LM head projects them
where the loss is computed: layouts of teacher and student stay independent. Here the teacher lives on the student's
ranks with the student's layout, and both heads are padded to the same number of rows, so that the shards cover the
same token ids. Other payloads (`payload`, `projection`) are made of the hidden states as soon as they are there.

Shapes: T tokens of a microbatch, N its loss positions, D the teacher's hidden size, V padded vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_opd.config.schema import PayloadKind
from megatron_opd.data.packing import Microbatch
from megatron_opd.models.gpt import GPT, packed_forward
from megatron_opd.models.lm_head import select_positions
from megatron_opd.objectives import LinearLogits, ServedLogprobs
from megatron_opd.parallel.schedule import run_schedule
from megatron_opd.teacher.dealing import payloads_for_student
from megatron_opd.teacher.host_weights import HostWeights
from megatron_opd.teacher.payload import PayloadFormat, TeacherPayload
from megatron_opd.teacher.projection import distribution, make_payload
from megatron_opd.teacher.teacher import Asked, Teacher

Made = TypeVar("Made")


class MegatronTeacher(Teacher):
    """A frozen model on the student's ranks, `chunks` of it on this one. It has no gradients and no optimizer.

    It hands over payloads of `form` (None: hidden states); where their making takes logits, those of `head_chunk`
    positions exist at once (None: of a microbatch's). With `offload` its weights are in host memory but inside
    `resident()`, all except the LM head if it `lends_head`: the objective projects with it while the student trains.
    """

    def __init__(
        self,
        chunks: Sequence[GPT],
        groups: ProcessGroupCollection,
        *,
        form: PayloadFormat | None = None,
        head_chunk: int | None = None,
        offload: bool = False,
        lends_head: bool = True,
    ) -> None:
        self.chunks = [chunk.eval().requires_grad_(False) for chunk in chunks]
        self.groups = groups
        config = chunks[-1].config
        self.form = form or PayloadFormat(
            "hidden_states", config.hidden_size, chunks[-1].vocab_size, config.params_dtype
        )
        self._head_chunk = head_chunk
        self._offloaded: HostWeights | None = None
        if offload:
            head = chunks[-1].head_weight if lends_head and chunks[-1].post_process else None
            weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
            moved = [weight for weight in weights if weight is not head]
            self._offloaded = HostWeights(moved, weights[0].device)

    def resident(self) -> AbstractContextManager[None]:
        """Inside, the whole model can be run."""
        return nullcontext() if self._offloaded is None else self._offloaded.on_device()

    def score(self, asked: Asked) -> list[TeacherPayload | None]:
        """One payload a microbatch on the last pipeline stage, None on the others.

        Collectives: those of `hand_over` and `payloads_for_student`. Memory kept: `bytes_per_position` of the format
        for each of the N positions.
        """
        read = [microbatch.for_teacher for microbatch in asked.microbatches]
        payloads = self.hand_over(read, lambda payload: payload, asked.kind)
        return payloads_for_student(payloads, asked.microbatches, self.groups.cp)

    def hand_over(
        self,
        microbatches: Sequence[Microbatch],
        take: Callable[[TeacherPayload], Made],
        kind: PayloadKind | None = None,
    ) -> list[Made | None]:
        """What `take` makes of the payload of each microbatch, as soon as it is there and in their order.

        None but on the last pipeline stage. The payloads are of another `kind` than the run's if that is given.

        Collectives: those of a forward pass in the teacher's layout, and of `make_payload` a microbatch.
        """
        form = self.form.of_kind(kind)

        def make(hidden_ND: Tensor, microbatch: Microbatch) -> Made:
            targets_N = microbatch.targets_T[microbatch.mask_T]
            head_WD = self.chunks[-1].head_weight
            return take(
                make_payload(form, hidden_ND, targets_N, head_WD, self.groups.tp, chunk_size=self._head_chunk)
            )

        with self.resident():
            return from_hidden_states(self.chunks, microbatches, self.groups, make)

    def distribution(
        self, payload: TeacherPayload, *, chunked: bool
    ) -> Tensor | LinearLogits | ServedLogprobs:
        """What the objective reads of a payload, see `projection.distribution`.

        Last stage only, no collectives.
        """
        head_WD = self.chunks[-1].head_weight
        return distribution(payload, head_WD, head_WD.shape[0], self.groups.tp, chunked=chunked)


def from_hidden_states(
    chunks: Sequence[torch.nn.Module],
    microbatches: Sequence[Microbatch],
    groups: ProcessGroupCollection,
    make: Callable[[Tensor, Microbatch], Made],
) -> list[Made | None]:
    """What `make` makes of the final-norm hidden states [N, D] at the loss positions of each microbatch, one by one.

    None but on the last stage. A forward pass without gradients through this rank's `chunks`, bare or in DDP wrappers.
    """
    sharded = get_model_config(chunks[0]).sequence_parallel

    def forward_step(inputs: Any, chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        microbatch: Microbatch = next(inputs)
        hidden_T1D = packed_forward(
            chunk, microbatch.tokens_T, microbatch.position_ids_T, microbatch.cu_seqlens
        )

        def at_loss_positions(output_T1D: Tensor, non_loss_data: bool) -> Made:
            assert non_loss_data
            positions_N = microbatch.mask_T.nonzero()[:, 0]
            hidden_ND = select_positions(output_T1D, positions_N, group=groups.tp, sequence_parallel=sharded)
            return make(hidden_ND, microbatch)

        return hidden_T1D, at_loss_positions

    collected: list[Made | None] = run_schedule(
        forward_step,
        microbatches,
        chunks,
        groups,
        forward_only=True,
        collect=True,
    )
    return collected or [None] * len(microbatches)
