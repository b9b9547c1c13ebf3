"""The whole plan of a run: memory, work, traffic of every pipeline stage, and the seconds of a step."""

from dataclasses import dataclass
from functools import cached_property

from megatron_opd.config.schema import Config
from megatron_opd.plan.flops import stage_flops
from megatron_opd.plan.hardware import Hardware
from megatron_opd.plan.memory import StageMemory, stage_memory
from megatron_opd.plan.setting import Setting
from megatron_opd.plan.timing import Span, step_spans
from megatron_opd.plan.traffic import Traffic, stage_traffic


@dataclass(frozen=True)
class Plan:
    """What `setting` takes on `hardware`. Lists have an entry a pipeline stage."""

    setting: Setting
    hardware: Hardware
    memory: list[StageMemory]

    @classmethod
    def of(cls, config: Config, processes: int, hardware: Hardware) -> "Plan":
        """Raises UserError as `Setting.of`."""
        setting = Setting.of(config, processes, hardware.kernels)
        stages = range(setting.layout.pipeline)
        return cls(setting, hardware, [stage_memory(setting, stage) for stage in stages])

    @property
    def fullest(self) -> StageMemory:
        """The stage whose ranks hold the most."""
        return max(self.memory, key=lambda stage: stage.total)

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
        return step_spans(self.setting, self.hardware, self.traffic)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(span.total for span in self.spans.values())

    @property
    def tokens_per_second(self) -> float:
        """Response tokens of all replicas in a step, by its seconds."""
        work = self.setting.workload
        return work.responses * work.response / self.seconds
