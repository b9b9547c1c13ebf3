"""What binds a planned run, and which changes help: found by planning each of them, on as many processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_opd.config.layout_checks import alignment_of_run
from megatron_opd.config.schema import Config, ParallelConfig
from megatron_opd.errors import UserError
from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.plan.plan import Plan

_ROUNDS = 6  # changes that are combined at most until a run fits
_SHOWN = 3
_WORTH = 0.97  # of the step's time: what saves less is not worth a line
Changes = dict[str, Any]


@dataclass(frozen=True)
class Advice:
    """Keys to set together, and the plan with them."""

    changes: Changes
    plan: Plan

    def __str__(self) -> str:
        keys = " ".join(f"{key}={_yaml(value)}" for key, value in self.changes.items())
        peak, usable = self.plan.fullest.total / 2**30, self.plan.hardware.usable / 2**30
        return f"{keys}: {peak:.3g} of {usable:.3g} GiB, {self.plan.seconds:.3g} s a step"


def advise(plan: Plan) -> list[Advice]:
    """Changes that make the run fit or, if it does, its step shorter, best first.

    When no single change makes it fit, one piece of advice with several. Empty when nothing helps.
    """
    tried = [Advice(changes, planned) for changes, planned in _planned(plan)]
    fitting = sorted((one for one in tried if one.plan.fits), key=lambda one: one.plan.seconds)
    if plan.fits:
        return [one for one in fitting if one.plan.seconds < _WORTH * plan.seconds][:_SHOWN]
    if fitting:
        return fitting[:_SHOWN]
    return _combined(tried, plan)


def _combined(tried: list[Advice], plan: Plan) -> list[Advice]:
    """Rounds of the best change that leaves less memory, until the run fits or nothing helps any more.

    Best: the excess over the device, and the time that it costs, both relative, have the smallest sum.
    """

    def cost(one: Advice) -> float:
        excess = max(0, one.plan.fullest.total - plan.hardware.usable) / plan.hardware.usable
        return excess + one.plan.seconds / plan.seconds

    best: Advice | None = None
    smallest = plan.fullest.total
    for _ in range(_ROUNDS):
        tried = [one for one in tried if one.plan.fullest.total < smallest]
        if not tried:
            break
        fitting = [one for one in tried if one.plan.fits]
        best = min(fitting or tried, key=cost)
        if fitting:
            break
        smallest = best.plan.fullest.total
        tried = [Advice({**best.changes, **changes}, planned) for changes, planned in _planned(best.plan)]
    return [best] if best else []


def _planned(plan: Plan) -> Iterator[tuple[Changes, Plan]]:
    """Every change that a run would accept."""
    for changes in _changes(plan):
        try:
            config = changed(plan.setting.config, changes)
            yield changes, Plan.of(config, plan.setting.processes, plan.hardware)
        except UserError:
            continue  # heads, layers or experts that do not divide, and the like


def changed(config: Config, changes: Changes) -> Config:
    """The configuration with these keys set."""
    tree = config.model_dump()
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            section = section[part]
        section[name] = value
    return Config.model_validate(tree)


def _changes(plan: Plan) -> Iterator[Changes]:
    """Neighbours of the configuration: every knob of memory and time one notch up and down."""
    setting, config = plan.setting, plan.setting.config
    layout, work = setting.layout, setting.workload
    for policy in ("none", "selective", "full"):
        if policy != config.training.recompute:
            yield {"training.recompute": policy}
    for chunk in (None, 1024, 4096):
        if chunk != config.objective.head_chunk:
            yield {"objective.head_chunk": chunk}
    for batch in (work.decoded_together // 2, min(2 * work.decoded_together, work.generated)):
        if setting.own_rollouts and 0 < batch != work.decoded_together:
            yield {"rollout.max_batch": batch}
    budget, segment = config.training.microbatch_tokens, alignment_of_run(config)
    least = -(-(work.prompt + work.response) // segment) * segment
    for tokens in sorted({least, 2 * budget, max(least, budget // 2 // segment * segment)} - {budget}):
        yield {"training.microbatch_tokens": tokens}
    if not config.optimizer.sharded and config.optimizer.name == "adam":
        yield {"optimizer.distributed": True}
    if plan.hardware.kernels != "cpu" and setting.teacher is not None and not config.teacher.offload:
        yield {"teacher.offload": True}
    if not config.optimizer.cpu_offload and config.optimizer.name == "adam":
        yield {"optimizer.cpu_offload": True}
    yield from _layouts("parallel", config.parallel, layout)
    if setting.own_layout is not None and config.teacher.parallel is not None:
        yield from _layouts("teacher.parallel", config.teacher.parallel, setting.own_layout)


def _layouts(key: str, parallel: ParallelConfig, layout: ParallelLayout) -> Iterator[Changes]:
    """Other layouts of the same processes: one size doubled or halved, data parallel takes up the rest."""
    if layout.tensor > 1 and not layout.sequence_parallel:
        yield {f"{key}.sequence_parallel": True}
    for power in range(layout.world_size.bit_length()):
        if 2**power != layout.expert:
            yield {f"{key}.expert": 2**power}
    yield {f"{key}.virtual_pipeline": 2 if layout.virtual_pipeline == 1 else 1}
    for name in ("tensor", "pipeline", "context"):
        for size in (2 * getattr(layout, name), getattr(layout, name) // 2):
            sizes = {
                "tensor": layout.tensor,
                "pipeline": layout.pipeline,
                "context": layout.context,
                name: size,
            }
            ranks = sizes["tensor"] * sizes["pipeline"] * sizes["context"]
            if size == 0 or layout.world_size % ranks:
                continue
            changes: Changes = {f"{key}.{name}": size}
            if parallel.data is not None or key != "parallel":
                changes[f"{key}.data"] = layout.world_size // ranks
            if name == "tensor" and (size > 1) != layout.sequence_parallel:
                changes[f"{key}.sequence_parallel"] = size > 1
            yield changes


def verdict(plan: Plan) -> list[str]:
    """One line for the memory, one for the time."""
    full = plan.fullest
    largest = max(full.parts, key=lambda name: full.parts[name])
    word = "fits" if plan.fits else "DOES NOT FIT"
    memory = (
        f"memory: {word}: {full.total / 2**30:.3g} of {plan.hardware.usable / 2**30:.3g} GiB on the fullest rank "
        f"({full}), most in {full.phase}; its largest part: {largest}, "
        f"{full.parts[largest] / 2**30:.3g} GiB"
    )
    longest = max(plan.spans, key=lambda name: plan.spans[name].total)
    span = plan.spans[longest]
    rate = f", {plan.tokens_per_second:,.0f} response tokens/s"
    if plan.setting.teacher is None or not plan.setting.own_rollouts:
        rate = " without what servers take"
    time = (
        f"time: {plan.seconds:.3g} s a step{rate}; {longest} takes "
        f"{span.total / plan.seconds:.0%}, bound by {span.limit}"
    )
    return [memory, time]


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower()
