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
    target_T = gather_sequence(target.mask_T.long()[None], target.cu_seqlens, group)[0].bool()
    number_T = target_T.long().cumsum(0) - 1
    mine = zigzag_positions(target.cu_seqlens, group.rank(), group.size()).to(number_T.device)
    wanted_n = number_T[mine[target.mask_T]]
    return [whole[wanted_n] for whole in whole_rows(source, tensors, group)]


def whole_rows(share: Microbatch, tensors: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Of [n, ...] tensors, one row a loss position of this rank's share of a microbatch, those of the whole [N, ...].

    Collectives over the context-parallel group, if it has several ranks: 1 all-gather, and 1 a tensor.
    """
    if group.size() == 1:
        return list(tensors)
    mask_T = gather_sequence(share.mask_T.long()[None], share.cu_seqlens, group)[0].bool()
    found = []
    for rows in tensors:
        columns = (rows[:, None] if rows.ndim == 1 else rows.flatten(1)).t()
        held = columns.new_zeros(len(columns), len(share.mask_T))
        held[:, share.mask_T] = columns
        whole_NC = gather_sequence(held, share.cu_seqlens, group)[:, mask_T].t()
        found.append(whole_NC.reshape(len(whole_NC), *rows.shape[1:]))
    return found
