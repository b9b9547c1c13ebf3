"""Several teachers on the student's processes: one for each microbatch (routed), or all for every one (mixed)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_opd.objectives import LinearLogits, ServedLogprobs
from megatron_opd.teacher.payload import Mixture, Part, TeacherPayload
from megatron_opd.teacher.teacher import Asked, Teacher


@dataclass(frozen=True)
class SeveralTeachers(Teacher):
    """Teachers by name, all in one layout. `weights` sum to 1 over them; None: every microbatch has one teacher."""

    teachers: Mapping[str, Teacher]
    weights: Mapping[str, float] | None = None

    def described(self) -> str:
        """Which there are, how they are used, and their layouts where these are their own."""
        if self.weights is None:
            each = f"{', '.join(self.teachers)}, one a prompt"
        else:
            each = ", ".join(f"{name} {weight:.3g}" for name, weight in self.weights.items())
        layouts = {teacher.described() for teacher in self.teachers.values()} - {""}
        return ": ".join([each, *layouts])

    @property
    def names(self) -> Sequence[str]:
        """Of all teachers."""
        return list(self.teachers)

    def score(self, asked: Asked) -> list[Mixture | None]:
        """One mixture a microbatch of this rank's on the student's last stage, None on its others.

        Each teacher forwards its own microbatches alone, one teacher after the other; one that has none forwards
        nothing. Collectives: those of each teacher's `score`.
        """
        parts: list[list[Part]] = [[] for _ in asked.microbatches]
        for name, teacher in self.teachers.items():
            mine = [i for i in range(len(parts)) if self.weights is not None or asked.routes[i] == name]
            if not mine:
                continue
            weight = 1.0 if self.weights is None else self.weights[name]
            for i, payload in zip(mine, teacher.score(asked.only(mine)), strict=True):
                if payload is not None:
                    parts[i].append(Part(name, weight, payload))
        return [Mixture(tuple(each)) if each else None for each in parts]

    def distribution(
        self, payload: TeacherPayload, *, chunked: bool
    ) -> Tensor | LinearLogits | ServedLogprobs:
        """What the objective reads of a part of a mixture. Last stage only, no collectives."""
        assert isinstance(payload, Part)
        return self.teachers[payload.teacher].distribution(payload.payload, chunked=chunked)

    def metrics(self) -> dict[str, float]:
        """Sums of those of all teachers."""
        found: dict[str, float] = {}
        for teacher in self.teachers.values():
            for name, value in teacher.metrics().items():
                found[name] = found.get(name, 0.0) + value
        return found
