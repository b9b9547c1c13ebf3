"""Seconds of a step on given hardware: the sum of its phases, each that of its slowest pipeline stage.

A pass takes the longest of three: its operations at the achieved part of the peak, reading what it has to read at the
achieved bandwidth, and starting its kernels one after the other. What is sent comes on top: nothing overlaps, as the
run has it configured, but a teacher on ranks of its own scores while the student learns. A group whose ranks lie in
several nodes runs at the speed of one device's link between nodes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_opd.models.architecture import Architecture
from megatron_opd.plan.flops import (
    decode_layer,
    head_product,
    layer_again,
    layer_backward,
    layer_forward,
    objective_flops,
    scoring_passes,
)
from megatron_opd.plan.hardware import Hardware, Link
from megatron_opd.plan.memory import frozen_bytes
from megatron_opd.plan.parameters import Parameter, stage_layers, stage_parameters
from megatron_opd.plan.setting import Pack, Setting
from megatron_opd.plan.traffic import Traffic
from megatron_opd.rollout.local import PROMPT_TOKENS
from megatron_opd.teacher.window import WINDOW

_FP32 = 4
_AVERAGE = 12.0  # bytes a number: the average is read and written, the weights that it follows are read
LIMITS = ("arithmetic", "memory reads", "kernel starts", "sending", "idle")


@dataclass(frozen=True)
class Starts:
    """Operations that a layer starts, counted in the code as it is (tests/plan/test_timing.py counts again)."""

    dense: int
    routed: int  # a layer with experts, without what each expert starts
    expert: int  # each expert that has tokens here


FORWARD, BACKWARD, DECODE = Starts(99, 128, 7), Starts(118, 128, 15), Starts(23, 27, 11)
_DRAW = 40  # drawing a token of every sequence


@dataclass(frozen=True)
class Span:
    """Seconds of a phase, and how they divide among `LIMITS`."""

    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """All together."""
        return sum(self.seconds.values())

    @property
    def limit(self) -> str:
        """What takes the most of it."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def step_spans(
    setting: Setting, hardware: Hardware, traffic: Sequence[Sequence[Traffic]], teacher: Span | None = None
) -> dict[str, Span]:
    """The phases of a step on these ranks; `traffic` is that of every stage.

    `teacher` are the passes of one in a layout of its own: on the same ranks a part of `scoring`, on others what the
    student waits for them in all.
    """
    clock = _Clock(setting, hardware, traffic)
    rollout = {"prompts": clock.prompts(), "decoding": clock.decoding()} if setting.own_rollouts else {}
    here = [(setting.teacher, 1.0)] if setting.teacher is not None and setting.teacher_here else []
    scoring, training = clock.scoring([*here, *scoring_passes(setting)]), clock.training()
    spans = {**rollout, "scoring": scoring, "training": training, "optimizer": clock.optimizer()}
    if teacher is None:
        return spans
    if not setting.separate:
        both = {name: scoring.seconds[name] + teacher.seconds[name] for name in LIMITS}
        return {**spans, "scoring": Span(both)}
    idle = waited(setting, teacher, scoring.total, training.total)
    return {**spans, "waiting": Span({**dict.fromkeys(LIMITS, 0.0), "idle": idle})}


def teacher_span(setting: Setting, hardware: Hardware, traffic: Sequence[Sequence[Traffic]]) -> Span:
    """The passes of a teacher in a layout of its own in a step; `traffic` is that of every stage of it."""
    assert setting.teacher is not None
    return _Clock(setting.teaching, hardware, traffic).scoring([(setting.teacher, 1.0)])


def waited(setting: Setting, teacher: Span, scoring: float, training: float) -> float:
    """Seconds of a step that the student waits for a teacher on ranks of its own.

    Both begin with the step's scoring, which takes the student `scoring` seconds for other models; its microbatches
    take equally long. A payload leaves when it is made, the first after the teacher's pipeline is filled, but no sooner
    than the student is at the one `WINDOW` before it.
    """
    count, updates = setting.workload.updates * setting.workload.microbatches, setting.workload.updates
    first = teacher.seconds["idle"] / updates
    making, learning = (teacher.total - first) / count, training / count
    arrived, free, begun = first, scoring, list[float]()
    for number in range(count):
        arrived = max(arrived + making, begun[number - WINDOW] if number >= WINDOW else 0.0)
        begun.append(max(arrived, free))
        free = begun[-1] + learning
    return max(0.0, free - scoring - training)


@dataclass(frozen=True)
class _Clock:
    setting: Setting
    hardware: Hardware
    traffic: Sequence[Sequence[Traffic]]

    def prompts(self) -> Span:
        """Passes of at most PROMPT_TOKENS tokens, one behind the other through the stages."""
        work, student = self.setting.workload, self.setting.student
        total = work.prompts * work.prompt
        tokens = min(max(PROMPT_TOKENS, work.prompt), total)
        passes = math.ceil(total / tokens)
        pack = Pack(tokens, 0, tokens, work.prompt)
        times = []
        for stage in self._stages:
            layers = stage_layers(student, self.setting.layout)
            flops = layers * layer_forward(self.setting, student, pack) * self.setting.layout.context
            times.append(
                self._work(flops, self._held(student, stage), layers * self._starts(student, FORWARD))
            )
        sent = [self._sent(stage, "prompts") for stage in self._stages]
        return self._pipelined(times, passes, sent)

    def decoding(self) -> Span:
        """A token goes through all stages before the next begins; the response grows meanwhile."""
        setting, work, arch = self.setting, self.setting.workload, self.setting.student
        slots = work.prompt + work.response / 2
        cached = 2 * work.decoded_together * slots * arch.num_kv_groups * arch.head_dim
        cached *= setting.bytes_per_value / setting.layout.tensor
        seconds = dict.fromkeys(LIMITS, 0.0)
        for stage in self._stages:
            layers = stage_layers(arch, self.setting.layout)
            flops = layers * decode_layer(setting, arch, slots)
            read = self._decoded_weights(stage) + layers * cached
            starts = layers * self._starts(arch, DECODE)
            if stage == setting.layout.pipeline - 1:
                flops += (
                    head_product(setting, arch.hidden_size, work.decoded_together) * setting.layout.context
                )
                starts += _DRAW
            for name, value in self._work(flops, read, starts).items():
                seconds[name] += value
        steps = work.response * work.generated / work.decoded_together
        seconds = {name: value * steps for name, value in seconds.items()}
        # Sums and hand-overs of one stage after those of the other.
        seconds["sending"] += sum(self._sent(stage, "decoding") for stage in self._stages)
        return Span(seconds)

    def scoring(self, models: Sequence[tuple[Architecture, float]]) -> Span:
        """Forward passes of these models, each in a share of the updates; offloaded weights come first."""
        setting, work = self.setting, self.setting.workload
        last = setting.layout.pipeline - 1
        times = []
        for stage in self._stages:
            stage_time = dict.fromkeys(LIMITS, 0.0)
            for arch, share in models:
                layers = stage_layers(arch, self.setting.layout)
                flops = layers * layer_forward(setting, arch, setting.scored_pack(arch))
                if stage == last and (arch is not setting.teacher or setting.teacher_projects):
                    flops += head_product(setting, arch.hidden_size, work.pack.loss_tokens)
                passed = self._work(flops, self._held(arch, stage), layers * self._starts(arch, FORWARD))
                stage_time = {name: stage_time[name] + share * passed[name] for name in LIMITS}
            times.append(stage_time)
        sent = [self._sent(stage, "scoring") + self._lent(stage) for stage in self._stages]
        return self._pipelined(times, work.updates * work.microbatches, sent)

    def training(self) -> Span:
        """Forward, recomputation and backward; on the last stage the heads and the objective."""
        setting, work, arch = self.setting, self.setting.workload, self.setting.student
        again = setting.config.training.recompute == "full"
        starts = self._starts(arch, FORWARD) * (2 if again else 1) + self._starts(arch, BACKWARD)
        per_layer = layer_forward(setting, arch, work.pack) + layer_backward(setting, arch, work.pack)
        per_layer += layer_again(setting, arch, work.pack)
        times = []
        for stage in self._stages:
            layers = stage_layers(arch, self.setting.layout)
            flops = layers * per_layer
            if stage == setting.layout.pipeline - 1:
                flops += objective_flops(setting, work.pack)
            times.append(self._work(flops, 3 * self._held(arch, stage), layers * starts))
        sent = [self._sent(stage, "training") for stage in self._stages]
        return self._pipelined(times, work.updates * work.microbatches, sent)

    def optimizer(self) -> Span:
        """Reads gradient, master and moments and writes the last three and the weight: some 30 bytes a number.

        Offloaded, the gradient goes to the host and the weight comes back, which takes 30 bytes a number there.
        """
        setting = self.setting
        spans = []
        for stage in self._stages:
            held = [p for chunk in self._parameters(setting.student, stage) for p in chunk]
            if setting.config.optimizer.sharded:
                numbers = sum(p.numel / self._sharing(p) for p in held)
            else:
                numbers = float(sum(p.numel for p in held))
            numbers *= setting.workload.updates
            seconds = self._work(0.0, 30.0 * numbers, 0.0)
            if setting.config.teacher.ema is not None:
                average = _AVERAGE * setting.workload.updates * sum(p.numel for p in held)
                for name, value in self._work(0.0, average, 0.0).items():
                    seconds[name] += value
            if setting.config.optimizer.cpu_offload:
                moved = 30.0 + _FP32 + setting.bytes_per_value
                seconds["memory reads"] = moved * numbers / (1e9 * self.hardware.host_bandwidth)
            spans.append(Span({**seconds, "sending": self._sent(stage, "optimizer")}))
        return max(spans, key=lambda span: span.total)

    @property
    def _stages(self) -> range:
        return range(self.setting.layout.pipeline)

    def _lent(self, stage: int) -> float:
        """Seconds that offloaded weights take to the device, once an update."""
        config, setting = self.setting.config, self.setting
        teacher = setting.teacher if setting.teacher_here else None
        models = ((config.teacher, teacher), (config.reference, setting.reference))
        moved = sum(
            frozen_bytes(setting, arch, stage)[1]
            for model, arch in models
            if model is not None and arch is not None and model.offload
        )
        return setting.workload.updates * moved / (1e9 * self.hardware.host_bandwidth)

    def _parameters(self, arch: Architecture, stage: int) -> tuple[tuple[Parameter, ...], ...]:
        return stage_parameters(arch, self.setting.layout, self.setting.padded_vocab, stage)

    def _sharing(self, parameter: Parameter) -> int:
        return self.setting.expert_data_ranks if parameter.expert else self.setting.data_ranks

    def _held(self, arch: Architecture, stage: int) -> float:
        """Bytes of a stage's weights."""
        return self.setting.bytes_per_value * sum(p.numel for c in self._parameters(arch, stage) for p in c)

    def _decoded_weights(self, stage: int) -> float:
        """Bytes that a decoding step reads: of experts those that some sequence is routed to, evenly."""
        setting, arch = self.setting, self.setting.student
        parameters = [p for chunk in self._parameters(arch, stage) for p in chunk if p.matrix]
        dense = sum(p.numel for p in parameters if not p.expert)
        experts = sum(p.numel for p in parameters if p.expert) * setting.layout.expert / setting.layout.tensor
        return setting.bytes_per_value * (dense + experts * self._used_experts)

    @property
    def _used_experts(self) -> float:
        """Share of the experts that a decoding step needs."""
        moe = self.setting.student.moe
        if moe is None:
            return 1.0
        return 1.0 - (1.0 - moe.experts_per_token / moe.num_experts) ** self.setting.workload.decoded_together

    def _starts(self, arch: Architecture, starts: Starts) -> float:
        """Operations of a layer; decoding, a rank has its tensor-parallel part of all experts."""
        if arch.moe is None:
            return starts.dense
        if starts is DECODE:
            return (
                starts.routed
                + starts.expert * self._used_experts * arch.num_experts / self.setting.layout.tensor
            )
        return starts.routed + starts.expert * arch.num_experts / self.setting.layout.expert

    def _work(self, flops: float, read: float, starts: float) -> dict[str, float]:
        """Seconds under the name of the longest of the three; the others overlap with it."""
        hardware = self.hardware
        peak = 1e12 * getattr(hardware.peak, self.setting.config.precision) * hardware.achieved
        times = {
            "arithmetic": flops / peak,
            "memory reads": read / (1e9 * hardware.memory_bandwidth * hardware.memory_achieved),
            "kernel starts": 1e-6 * hardware.launch * starts,
        }
        longest = max(times, key=lambda name: times[name])
        return {name: times[name] if name == longest else 0.0 for name in LIMITS if name in times} | {
            "sending": 0.0,
            "idle": 0.0,
        }

    def _pipelined(self, times: list[dict[str, float]], passes: int, sent: list[float]) -> Span:
        """`passes` microbatches through stages with these times a microbatch, and what each sends for all of them.

        The slowest stage works without a pause once the pipeline is full; filling and emptying it takes its time for a
        microbatch once a stage but one, divided by VPP.
        """
        totals = [passes * sum(time.values()) + extra for time, extra in zip(times, sent, strict=True)]
        slowest = totals.index(max(totals))
        seconds = {name: passes * value for name, value in times[slowest].items()}
        seconds["sending"] += sent[slowest]
        layout = self.setting.layout
        fill = (layout.pipeline - 1) / layout.virtual_pipeline
        rounds = self.setting.workload.updates
        seconds["idle"] = fill * rounds * totals[slowest] / max(passes, 1)
        return Span(seconds)

    def _sent(self, stage: int, phase: str) -> float:
        """Seconds that a stage communicates in a phase."""
        return sum(self._seconds(one) for one in self.traffic[stage] if one.phase == phase)

    def _seconds(self, traffic: Traffic) -> float:
        link = self._link(traffic.group)
        rounds = 1 if traffic.kind == "send" else math.ceil(math.log2(traffic.ranks))
        return traffic.sent / (1e9 * link.bandwidth) + traffic.calls * rounds * 1e-6 * link.latency

    def _link(self, group: str) -> Link:
        """Ranks are dealt to nodes in order, tensor-parallel neighbours first, then CP, DP and PP."""
        layout = self.setting.layout
        same_layers = layout.tensor * layout.context * layout.data
        reach = {
            "tp": layout.tensor,
            "cp": layout.tensor * layout.context,
            "ep": layout.expert,
            "dp_cp": same_layers,
            "expt_dp": same_layers,
            "messages": self.setting.processes,
        }.get(group, same_layers * layout.pipeline)
        hardware = self.hardware
        return hardware.within_node if reach <= hardware.devices_per_node else hardware.between_nodes
