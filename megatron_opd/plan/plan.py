"""The whole plan of a run: memory, work, traffic of every pipeline stage, and the seconds of a step."""

from dataclasses import dataclass
from functools import cached_property

from megatron_opd.config.schema import Config
from megatron_opd.plan.flops import stage_flops, teacher_flops
from megatron_opd.plan.hardware import Hardware
from megatron_opd.plan.memory import StageMemory, stage_memory, teacher_memory
from megatron_opd.plan.setting import Setting
from megatron_opd.plan.timing import Span, step_spans, teacher_span
from megatron_opd.plan.traffic import Traffic, stage_traffic, teacher_traffic


@dataclass(frozen=True)
class Plan:
    """What `setting` takes on `hardware`. Lists have an entry a pipeline stage.

    Those named after the teacher are of one in a layout of its own, in its stages; `teacher_memory` of one on ranks of
    its own, whose part in `memory` is none.
    """

    setting: Setting
    hardware: Hardware
    memory: list[StageMemory]
    teacher_memory: list[StageMemory]

    @classmethod
    def of(cls, config: Config, processes: int, hardware: Hardware) -> "Plan":
        """Raises UserError as `Setting.of`."""
        setting = Setting.of(config, processes, hardware.kernels)
        stages = range(setting.layout.pipeline)
        theirs = range(setting.teaching.layout.pipeline) if setting.separate else ()
        return cls(
            setting,
            hardware,
            [stage_memory(setting, stage) for stage in stages],
            [teacher_memory(setting, stage) for stage in theirs],
        )

    @property
    def fullest(self) -> StageMemory:
        """The stage whose ranks hold the most."""
        return max([*self.memory, *self.teacher_memory], key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        """Whether every rank's peak fits the device."""
        return self.fullest.total <= self.hardware.usable

    @cached_property
    def flops(self) -> list[dict[str, float]]:
        """Of a rank in a step, by what they are for."""
        return [stage_flops(self.setting, stage) for stage in range(self.setting.layout.pipeline)]

    @cached_property
    def traffic(self) -> list[list[Traffic]]:
        """Of a rank in a step."""
        return [stage_traffic(self.setting, stage) for stage in range(self.setting.layout.pipeline)]

    @cached_property
    def spans(self) -> dict[str, Span]:
        """Seconds of the phases of a step."""
        return step_spans(self.setting, self.hardware, self.traffic, self.teacher_span)

    @cached_property
    def teacher_flops(self) -> list[dict[str, float]]:
        """Of a rank in a step."""
        return [teacher_flops(self.setting.teaching, stage) for stage in self._teacher_stages]

    @cached_property
    def teacher_traffic(self) -> list[list[Traffic]]:
        """Of the busiest rank in a step, payloads included."""
        return [teacher_traffic(self.setting, stage) for stage in self._teacher_stages]

    @cached_property
    def teacher_span(self) -> Span | None:
        """Its passes in a step. On ranks of its own they run beside the student's training, and are none of `spans`."""
        if self.setting.own_layout is None:
            return None
        return teacher_span(self.setting, self.hardware, self.teacher_traffic)

    @property
    def hidden_seconds(self) -> float:
        """Of a teacher on ranks of its own in a step, while the student scores or trains."""
        if not self.setting.separate or self.teacher_span is None:
            return 0.0
        return max(0.0, self.teacher_span.total - self.spans["waiting"].total)

    @property
    def _teacher_stages(self) -> range:
        return range(0 if self.setting.own_layout is None else self.setting.own_layout.pipeline)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(span.total for span in self.spans.values())

    @property
    def tokens_per_second(self) -> float:
        """Response tokens of all replicas in a step, by its seconds."""
        work = self.setting.workload
        return work.responses * work.response / self.seconds
