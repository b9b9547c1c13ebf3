"""Teacher payloads on the ranks of a run: what is held of them and, between two layouts, who sends how much to whom.

Between layouts it is counted on `Layouts.routes`, which the run itself sends by: the routes of as many whole
microbatches as it takes until both models' replicas have come round, each of a few loss tokens. Every microbatch of
the run is a multiple of these, up to the uneven ends of its responses.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from megatron_opd.data.packing import pack
from megatron_opd.data.rollouts import Rollout
from megatron_opd.plan.setting import Setting
from megatron_opd.teacher.transport import Layouts, Route
from megatron_opd.teacher.window import WINDOW

_FP32 = 4
_INDEX = 8  # int64


@dataclass(frozen=True)
class Handover:
    """Rows that go from rank to rank, a loss token of the step, and what is held, a loss token of a microbatch.

    `sent` and `received` have the ranks between which something goes; what a rank keeps is not sent.
    """

    sent: dict[int, float]
    received: dict[int, float]
    messages: dict[int, float]  # that a rank sends of each tensor, a whole microbatch of the step
    made: float  # of a payload, by a rank of the teacher's last stage
    leaving: float  # of a payload under way, by its fullest sender: it, or copies of parts of it
    copied: float  # of these the copies
    read: float  # of a payload, by a rank of the student's last stage
    arriving: float  # of a payload under way, by its fullest receiver: it, and room for parts of it

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, layouts: Layouts) -> "Handover":
        """Between these layouts."""
        student, teacher = layouts.student, layouts.teacher
        length = math.lcm(student.segment_alignment, teacher.segment_alignment)
        count = math.lcm(student.data, teacher.data)
        sample = Rollout("", 0, [0], [0] * length, [0.0] * length, "length", 0)
        ((whole,),) = pack([sample], dp_size=1, token_budget=length, alignment=length)
        made, read = length // teacher.context, length // student.context
        sent: Counter[int] = Counter()
        received: Counter[int] = Counter()
        messages: Counter[int] = Counter()
        by_sender: dict[tuple[int, int], list[Route]] = {}
        parts: Counter[tuple[int, int]] = Counter()
        for route in layouts.routes([whole] * count):
            rows = len(route.placed_M)
            parts[route.number, route.receiver] += rows if rows < read else 0
            if route.sender != route.receiver:
                sent[route.sender] += rows
                received[route.receiver] += rows
                messages[route.sender] += 1
                by_sender.setdefault((route.number, route.sender), []).append(route)
        tokens = length * count
        return cls(
            sent={rank: rows / tokens for rank, rows in sent.items()},
            received={rank: rows / tokens for rank, rows in received.items()},
            messages={rank: number / count for rank, number in messages.items()},
            made=made / length,
            leaving=max((_leaving(routes, made) for routes in by_sender.values()), default=0) / length,
            copied=max((_copied(routes, made) for routes in by_sender.values()), default=0) / length,
            read=read / length,
            arriving=(read + max(parts.values())) / length,
        )


def _leaving(routes: list[Route], made: int) -> int:
    """Rows that a sender holds of a payload under way: all where all of it goes anywhere, and copies of parts."""
    whole = any(len(route.taken_M) == made for route in routes)
    return (made if whole else 0) + _copied(routes, made)


def _copied(routes: list[Route], made: int) -> int:
    return sum(len(route.taken_M) for route in routes if len(route.taken_M) < made)


def held_payloads(setting: Setting, stage: int | None, theirs: int | None, *, scoring: bool) -> int:
    """Bytes of payloads on a rank with this stage of the student and that one of the teacher, None where it has none:
    while the teacher scores, or else while the student trains.

    Of a teacher in the student's layout, or behind servers, all of a step, on the last stage. In another layout on the
    same ranks, besides, those of an update that the teacher's replica has made until they are sent. From a teacher on
    ranks of its own the student's have `WINDOW`, and in training the one that they are at; the teacher's `WINDOW`
    under way and the one that it makes.
    """
    if setting.own_layout is None:
        return _of_step(setting) if stage == setting.last_stage else 0
    assert setting.payload is not None
    work, form, route = setting.workload, setting.payload, Handover.of(setting.layouts)
    last, teaches = stage == setting.last_stage, theirs == setting.teaching.last_stage
    if setting.separate:
        share = 0.0
        window = min(WINDOW, work.updates * work.microbatches)
        if last:
            share = window * route.arriving + (0.0 if scoring else route.read)
        elif stage is None and teaches:
            share = window * route.leaving + route.made
        return math.ceil(share * work.fullest.loss_tokens) * form.bytes_per_position
    whole = _of_step(setting) if last else 0
    if not scoring:
        return whole
    rows = work.microbatches * work.pack.loss_tokens * (route.arriving - route.read) if last else 0.0
    if teaches:
        made = setting.teaching.workload.microbatches * work.pack.loss_tokens
        rows += made * (route.made + route.copied)
    return whole + math.ceil(rows) * form.bytes_per_position


def _of_step(setting: Setting) -> int:
    """At the loss tokens of all microbatches of a step: the teacher's payload, as hidden states N * Dt numbers; or what
    servers said, float32 log-probs of the sampled token and of K ids, the ids in int64."""
    work = setting.workload
    tokens = work.sequences * work.response // setting.layout.context
    return tokens * payload_row(setting)


def payload_row(setting: Setting) -> int:
    """Of a loss token."""
    if setting.payload is None:
        return _FP32 * (1 + setting.served_ids) + _INDEX * setting.served_ids
    return setting.payload.bytes_per_position


def dealt_payload(setting: Setting, stage: int | None) -> int:
    """A microbatch's payload under CP, from the shares of the teacher's own sequences to those of the student's: rows
    [T] of what the teacher read, gathered, put in order and picked. On the last stage of a layout that both share."""
    if setting.config.teacher.prompt_template is None or setting.layout.context == 1:
        return 0
    last = stage == setting.last_stage
    return last * 3 * payload_row(setting) * setting.workload.teacher_fullest.tokens
