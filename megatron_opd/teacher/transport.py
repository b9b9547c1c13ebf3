"""Teacher payloads from the ranks that make them to those that read them, where the two models' layouts differ.

Every student rank packs all rollouts alike, so the whole microbatches of all of them are known everywhere, with their
loss positions: who sends which rows to whom, and how many, follows on both sides from `routes_of`. Messages have no
headers and pass through no third rank. A sender's last stage holds the rows of whole microbatches (of its own
context-parallel share of them), every tensor-parallel rank the same; a receiver needs those of its zigzag share.

Whole microbatches are numbered index by index, in an index by the student's data-parallel rank: the order in which the
student uses them, and the teacher makes and sends them. Shapes: N rows of a payload, one a loss position; M rows that
one message carries.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.data.packing import Microbatch
from megatron_opd.objectives import zigzag_positions
from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.teacher.payload import PayloadFormat, TeacherPayload, tensors_of


@dataclass(frozen=True)
class Route:
    """One message: rows of a whole microbatch's payload from one rank to another, maybe the same."""

    number: int  # of the microbatch
    sender: int
    receiver: int
    taken_M: Tensor  # rows of the sender's payload
    placed_M: Tensor  # the same rows in the receiver's


def in_order(packed: Sequence[Sequence[Microbatch]]) -> list[Microbatch]:
    """The whole microbatches of all data-parallel ranks, by number."""
    return list(chain.from_iterable(zip(*packed, strict=True)))


def dealt(whole: Sequence[Microbatch], layout: ParallelLayout) -> list[list[int]]:
    """Numbers of the microbatches that each replica of the teacher forwards, in order; those without a loss position
    are nobody's."""
    scored = [number for number, microbatch in enumerate(whole) if microbatch.mask_T.any()]
    return [scored[replica :: layout.data] for replica in range(layout.data)]


def routes_of(
    packed: Sequence[Sequence[Microbatch]], student: ParallelLayout, teacher: ParallelLayout, first: int
) -> list[Route]:
    """Every message of these microbatches, by number. The student's ranks begin at 0, the teacher's at `first`.

    A rank that holds what it needs keeps it; the other receivers of a microbatch are spread over the ranks that do.
    """
    whole, found = in_order(packed), []
    replica_of = {n: replica for replica, numbers in enumerate(dealt(whole, teacher)) for n in numbers}
    for number in sorted(replica_of):
        for held_by in range(teacher.context):
            holders = [
                first
                + teacher.rank(
                    tensor=tensor,
                    context=held_by,
                    data=replica_of[number],
                    pipeline=teacher.pipeline - 1,
                )
                for tensor in range(teacher.tensor)
            ]
            held_N = rows_of_share(whole[number], held_by, teacher.context)
            for context in range(student.context):
                taken_M, placed_M = _matched(held_N, rows_of_share(whole[number], context, student.context))
                if not len(taken_M):
                    continue
                for tensor in range(student.tensor):
                    receiver = student.rank(
                        tensor=tensor,
                        context=context,
                        data=number % student.data,
                        pipeline=student.pipeline - 1,
                    )
                    turn = (context * student.tensor + tensor) % len(holders)
                    sender = receiver if receiver in holders else holders[turn]
                    found.append(Route(number, sender, receiver, taken_M, placed_M))
    return found


def rows_of_share(microbatch: Microbatch, rank: int, ranks: int) -> Tensor:
    """Which rows of a whole microbatch's payload are those of this context-parallel rank's share, in its order: [N]."""
    positions = zigzag_positions(microbatch.cu_seqlens, rank, ranks)
    rows_T = microbatch.mask_T.long().cumsum(0) - 1
    return rows_T[positions][microbatch.mask_T[positions]]


def _matched(held_N: Tensor, needed_N: Tensor) -> tuple[Tensor, Tensor]:
    """Places [M] in `held_N` and in `needed_N` of the rows that are in both."""
    end = int(max(held_N.max(initial := -1) if False else (held_N.amax() if len(held_N) else -1), initial))
    raise NotImplementedError(end)
