"""Rows at loss positions from one cut of a microbatch to another, over context-parallel ranks.

A rank holds a zigzag share of each sequence. A teacher with prompts of its own reads other sequences than the student,
whose shares hold other response tokens; as a whole both have the same loss positions in the same order.

Shapes: T tokens of a whole microbatch, n loss positions of this rank's share, C columns of a row.
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from megatron_opd.data.packing import Microbatch
from megatron_opd.objectives import gather_sequence, zigzag_positions
from megatron_opd.teacher.payload import Awaited, Mixture, Part, TeacherPayload, tensors_of


def payloads_for_student(
    payloads: Sequence[TeacherPayload | None], microbatches: Sequence[Microbatch], group: dist.ProcessGroup
) -> list[TeacherPayload | None]:
    """Payloads of what the teacher has read of these microbatches, with the rows that the student's shares have.

    Collectives over the context-parallel `group`, where payloads are and the teacher has read prompts of its own: 2
    all-gathers a microbatch and 1 for each tensor of its payload.
    """

    def dealt(payload: TeacherPayload | None, microbatch: Microbatch) -> TeacherPayload | None:
        if payload is None or microbatch.teacher is None or group.size() == 1:
            return payload
        assert not isinstance(payload, Awaited | Part | Mixture)  # of one teacher in the student's layout
        rows = rows_for(microbatch, microbatch.teacher, tensors_of(payload), group)
        return type(payload)(*rows)

    return [dealt(payload, each) for payload, each in zip(payloads, microbatches, strict=True)]


def rows_for(
    target: Microbatch, source: Microbatch, tensors: Sequence[Tensor], group: dist.ProcessGroup
) -> list[Tensor]:
    """Of [n, ...] tensors, one row a loss position of this rank's share of `source`, those of its share of `target`.

    Collectives over the context-parallel group: 2 all-gathers, and 1 a tensor.
    """
    source_T, target_T = (
        gather_sequence(each.mask_T.long()[None], each.cu_seqlens, group)[0].bool()
        for each in (source, target)
    )
    number_T = target_T.long().cumsum(0) - 1
    mine = zigzag_positions(target.cu_seqlens, group.rank(), group.size()).to(number_T.device)
    wanted_n = number_T[mine[target.mask_T]]
    found = []
    for rows in tensors:
        columns = (rows[:, None] if rows.ndim == 1 else rows.flatten(1)).t()
        share = columns.new_zeros(len(columns), len(source.mask_T))
        share[:, source.mask_T] = columns
        whole_NC = gather_sequence(share, source.cu_seqlens, group)[:, source_T].t()
        found.append(whole_NC[wanted_n].reshape(len(wanted_n), *rows.shape[1:]))
    return found
