"""What the two processes of `teacher_payloads` do: a step with each payload in turns, the student's side measured.

Of a round, every payload has its turn: "in turn" the student begins when all payloads are there, "together" it trains
while the teacher, on the other process, scores on. Round 0 does not count: in it is recorded what is sent.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_opd.checkpoint.folders import alike
from megatron_opd.config.schema import Config, OptimizerConfig, PayloadKind
from megatron_opd.data.packing import Microbatch, pack
from megatron_opd.data.rollouts import Rollout
from megatron_opd.objectives import Objective
from megatron_opd.parallel import cpu
from megatron_opd.parallel.groups import build_groups
from megatron_opd.preflight import check_models
from megatron_opd.teacher.payload import Awaited, TeacherPayload
from megatron_opd.teacher.separate import SeparateTeacher, serve
from megatron_opd.teacher.sglang import SGLangTeacher
from megatron_opd.teacher.teacher import Asked
from megatron_opd.training.models import load_models, load_separate
from megatron_opd.training.relay import Relay, layout_of
from megatron_opd.training.student import Student, build_student, join_build
from megatron_opd.training.update import ObjectivePass, Update, UpdateScale
from megatron_opd.watch.phases import Phases
from tools.bench.relayed_bytes import Relayed, relayed
from tools.bench.traffic import Call, recorded_traffic

K, HEAD_CHUNK = 64, 128
TOPK = Objective(support="teacher_topk", k=K, remainder="bucket", served_at=1.0)
SAMPLED = Objective("policy_gradient", served_at=1.0)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Way:
    """One payload: what the teacher hands over, and the objective that reads it."""

    name: str
    kind: PayloadKind
    objective: Objective
    served: bool = False  # by SGLang


WAYS = [
    Way("hidden_states", "hidden_states", Objective()),
    Way("logits", "logits", Objective()),
    Way("topk", "topk", TOPK),
    Way("sampled", "sampled", SAMPLED),
    Way("SGLang, topk", "topk", TOPK, served=True),
    Way("SGLang, sampled", "sampled", SAMPLED, served=True),
]


@dataclass(frozen=True)
class Turn:
    """A step with one payload."""

    number: int  # of the round
    way: Way
    together: bool


@dataclass
class Found:
    """Of one payload: bytes for each token of the loss, seconds of every round that counts, and the loss of round 0."""

    asked: float = 0.0  # bytes to the teacher
    answered: float = 0.0
    loss: float = 0.0
    teacher: list[float] = field(default_factory=list)  # in turn, as `train`
    train: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)  # together

    @property
    def step(self) -> list[float]:
        """Seconds of the steps in turn."""
        return [one + other for one, other in zip(self.teacher, self.train, strict=True)]

    @property
    def hidden(self) -> float:
        """Median part of the teacher's seconds in turn for which the student does not wait together."""
        pairs = zip(self.waited, self.teacher, strict=True)
        return statistics.median(1 - waited / teacher for waited, teacher in pairs)


@dataclass(frozen=True)
class Work:
    """The folders of the models, and how much they do; `url`: a server of the teacher, if there is one."""

    student: Path
    teacher: Path
    sequences: int
    prompt: int  # tokens of each, as `response`
    response: int
    rounds: int
    url: str | None = None

    def turns(self) -> Iterator[Turn]:
        """What both processes do, in order."""
        for number in range(self.rounds + 1):
            for way in WAYS:
                if way.served and self.url is None:
                    continue
                yield Turn(number, way, together=False)
                if number and not way.served:
                    yield Turn(number, way, together=True)

    def packed(self, vocab: int, seed: int) -> list[list[Microbatch]]:
        """Random sequences, two a microbatch."""
        generator = torch.Generator().manual_seed(seed)
        length = self.prompt + self.response
        ids = torch.randint(vocab, (self.sequences, length), generator=generator).tolist()
        rollouts = [
            Rollout(
                str(row), 0, each[: self.prompt], each[self.prompt :], [-5.0] * self.response, "length", 0
            )
            for row, each in enumerate(ids)
        ]
        return pack(rollouts, dp_size=1, token_budget=2 * length)

    def config(self) -> Config:
        """Of a run with these models; what is not about them is never read."""
        tree = {
            "run_dir": "r",
            "precision": "fp32",
            "student": {"path": str(self.student)},
            "teacher": {"path": str(self.teacher), "parallel": {"separate": True}},
            "data": {"prompts": "p", "max_prompt_tokens": self.prompt},
            "rollout": {"max_new_tokens": self.response},
            "training": {"microbatch_tokens": 2 * (self.prompt + self.response)},
            "objective": {"support": "teacher_topk", "k": K, "remainder": "bucket", "head_chunk": HEAD_CHUNK},
        }
        return Config.model_validate(tree)


def measure(work: Work) -> dict[str, Found] | None:
    """What is found of each payload. Collective over WORLD, of two processes; None on the teacher's."""
    cpu.install()
    torch.set_num_threads(1)
    config = work.config()
    checked = check_models(config, dist.get_world_size())
    layout = layout_of(checked.parallel)
    groups = build_groups(layout)
    relay = Relay.of(checked, config.timeouts)
    assert relay is not None and relay.orders is not None
    if dist.get_rank() >= relay.layouts.first:
        model = load_separate(config, checked, relay, CPU)
        join_build()
        for turn in work.turns():
            with _recorded(turn) as calls:
                if turn.way.served:
                    with alike(dist.group.WORLD):  # as `SGLangTeacher.score`
                        pass
                else:
                    serve(
                        model,
                        relay.layouts,
                        relay.payload_group,
                        relay.orders,
                        _saves_nothing,
                        _saves_nothing,
                        device=CPU,
                        phases=Phases(),
                    )
            _sent(turn, calls, "send")
        return None
    chunks, teacher, _ = load_models(config, checked, layout, groups, CPU, relay)
    assert isinstance(teacher, SeparateTeacher)
    whole = OptimizerConfig(distributed=False)
    student = build_student(chunks, whole, groups, precision="fp32", steps=1)
    objective = ObjectivePass(
        chunks[-1], teacher, Objective(), checked.vocab_size, groups, head_chunk=HEAD_CHUNK
    )
    return _Side(work, student, objective, teacher).measure()


def _saves_nothing(*_: object) -> None:
    raise AssertionError("nobody saves here")


@contextmanager
def _recorded(turn: Turn) -> Iterator[list[Call]]:
    """Both processes begin together; the calls of round 0."""
    dist.barrier()
    if turn.number:
        yield []
        return
    with recorded_traffic() as calls:
        yield calls


def _sent(turn: Turn, calls: list[Call], kind: str) -> list[int]:
    """Bytes that each process has sent in a turn of round 0, by calls of its `kind`. Collective over WORLD."""
    everyone = [0, 0]
    if turn.number == 0:
        mine = sum(call.nbytes for call in calls if call.kind == kind and call.ranks > 1)
        dist.all_gather_object(everyone, mine)
    return everyone


@dataclass(frozen=True)
class _Side:
    """The student's."""

    work: Work
    student: Student
    objective: ObjectivePass
    separate: SeparateTeacher

    def measure(self) -> dict[str, Found]:
        found = {turn.way.name: Found() for turn in self.work.turns()}
        for seed, turn in enumerate(self.work.turns()):
            # A server remembers what it has read: no two turns that count have the same sequences.
            packed = self.work.packed(self.objective.vocab_size, seed if turn.number else 0)
            with self._teacher(turn) as (teacher, relay):
                with _recorded(turn) as calls:
                    self._step(turn, packed, teacher, found[turn.way.name])
                    if teacher is self.separate:
                        self.separate.finish()
                asked, answered = _sent(turn, calls, "broadcast")
                if turn.number == 0:
                    asked, answered = (relay.asked, relay.answered) if turn.way.served else (asked, answered)
                    tokens = UpdateScale.of(packed).loss_tokens
                    found[turn.way.name].asked = asked / tokens
                    found[turn.way.name].answered = answered / tokens
        return found

    @contextmanager
    def _teacher(self, turn: Turn) -> Iterator[tuple[SeparateTeacher | SGLangTeacher, Relayed]]:
        """The teacher of a turn, in round 0 behind a relay that counts."""
        url = self.work.url
        if not turn.way.served or url is None:
            yield self.separate, Relayed("")
            return
        k = K if turn.way.kind == "topk" else 0
        teacher = SGLangTeacher(self.objective.groups, vocab_size=self.objective.vocab_size, k=k)
        with nullcontext(Relayed(url)) if turn.number else relayed(url) as relay:
            teacher.connect([relay.url], concurrency=8)
            try:
                yield teacher, relay
            finally:
                teacher.close()

    def _step(
        self,
        turn: Turn,
        packed: list[list[Microbatch]],
        teacher: SeparateTeacher | SGLangTeacher,
        found: Found,
    ) -> None:
        """Score, hand over, forward and backward; what it took goes to `found`."""
        run = replace(self.objective, objective=turn.way.objective, teacher=teacher)
        self.student.zero_grad()
        began = time.perf_counter()
        payloads = teacher.score(_Asked(packed[0], packed, of_kind=turn.way.kind))
        if teacher is self.separate and not turn.together:
            payloads = [_arrived(payload) for payload in payloads]
        scored = time.perf_counter()
        scale = UpdateScale.of(packed)
        sums = run.run(self.student.ddps, Update(packed[0], scale, payloads)).sums
        ended = time.perf_counter()
        if turn.number == 0:
            found.loss = sums["loss"] / scale.loss_tokens
        elif turn.together:
            found.together.append(ended - began)
            found.waited.append(self.separate.metrics()["teacher_wait_seconds"])
        else:
            found.teacher.append(scored - began)
            found.train.append(ended - scored)


@dataclass(frozen=True)
class _Asked(Asked):
    """For payloads of any kind: a run has one."""

    of_kind: PayloadKind = "hidden_states"

    @property
    def kind(self) -> PayloadKind:
        return self.of_kind


def _arrived(payload: TeacherPayload | None) -> Awaited:
    """The same, but it has been waited for."""
    assert isinstance(payload, Awaited)
    there = payload.wait()
    return Awaited(lambda: there)
