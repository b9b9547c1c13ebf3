"""A plan as tables and lines for people, and as one object for machines."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_opd.models.architecture import Architecture
from megatron_opd.plan.advice import Advice, verdict
from megatron_opd.plan.memory import PHASES, StageMemory
from megatron_opd.plan.parameters import stage_layers
from megatron_opd.plan.plan import Plan
from megatron_opd.plan.setting import Setting
from megatron_opd.plan.timing import LIMITS
from megatron_opd.plan.traffic import (
    Traffic,
    group_sizes,
    payload_bytes,
    payloads_received,
    payloads_sent,
)

ASSUMED = (
    "Taken: every prompt and response has its longest length (an upper bound); microbatches are full; tokens spread "
    "evenly over the experts; communication overlaps with nothing; a group that reaches beyond a node runs at the "
    "speed between nodes. Segments are equally long: without transformer-engine attention pads uneven ones, which "
    "takes more. Evaluation and checkpoints are left out."
)

OWN_LAYOUT = (
    "The teacher's own layout: payloads are counted for loss tokens that are spread evenly over microbatches and "
    "context-parallel shares; on ranks of its own all microbatches take equally long. Not predicted: memory that NCCL "
    "takes for groups between the two layouts."
)

SERVED = (
    "Not predicted: memory and time of the SGLang servers, and the time that weights and log-probs take between them "
    "and these processes. Servers on the same machines need GPUs besides."
)


def print_plan(plan: Plan, advice: Sequence[Advice], console: Console | None = None) -> None:
    """The report: models, memory, time, traffic, verdict, advice."""
    console = console or Console(width=None if sys.stdout.isatty() else 100)

    def say(line: str, style: str = "") -> None:
        console.print(line, style=style, highlight=False, soft_wrap=True)

    for line in _heading(plan):
        say(line)
    for title, table in (
        *_parts(plan),
        _stages(plan),
        _time(plan),
        *_traffic(plan),
    ):
        if table.row_count:
            say(f"\n{title}", "bold")
            console.print(table)
    say("")
    for line in verdict(plan):
        say(line, "bold" if plan.fits else "bold red")
    if advice:
        say("tried, and faster:" if plan.fits else "tried, and smaller:")
    for one in advice:
        say(f"  {one}{'' if one.plan.fits else ' (still too much)'}")
    console.print(ASSUMED, style="dim", highlight=False)
    if plan.setting.own_layout is not None:
        console.print(OWN_LAYOUT, style="dim", highlight=False)
    if plan.setting.teacher is None or not plan.setting.own_rollouts:
        console.print(SERVED, style="dim", highlight=False)


def as_json(plan: Plan, advice: Sequence[Advice]) -> dict[str, Any]:
    """Everything in the report, in bytes, operations and seconds."""
    setting = plan.setting
    return {
        "layout": vars(setting.layout) | {"processes": setting.layout.world_size},
        "hardware": plan.hardware.model_dump(),
        "models": {
            role: {"total": arch.parameter_count(), "active": arch.parameter_count(active=True)}
            for role, arch in _models(plan)
        },
        "workload": asdict(setting.workload),
        "served": {
            "teacher": setting.teacher is None,
            "rollouts": not setting.own_rollouts,
            "payload_bytes": payload_bytes(setting) if setting.teacher is None else None,
        },
        "fits": plan.fits,
        "usable_bytes": plan.hardware.usable,
        "memory": [_memory(one) for one in plan.memory],
        "flops": plan.flops,
        "traffic": _sent(plan.traffic),
        "own_teacher": _own_teacher(plan),
        "seconds": {name: span.seconds for name, span in plan.spans.items()},
        "step_seconds": plan.seconds,
        "verdict": verdict(plan),
        "advice": [
            {
                "changes": one.changes,
                "fits": one.plan.fits,
                "bytes": one.plan.fullest.total,
                "step_seconds": one.plan.seconds,
            }
            for one in advice
        ],
    }


def _memory(one: StageMemory) -> dict[str, Any]:
    return {
        "stage": one.stage,
        "total": one.total,
        "peak": one.phase,
        "always": one.always,
        "phases": one.phases,
    }


def _sent(traffic: list[list[Traffic]]) -> list[list[dict[str, Any]]]:
    return [[vars(one) | {"sent": one.sent} for one in stage] for stage in traffic]


def _own_teacher(plan: Plan) -> dict[str, Any] | None:
    """Of a teacher in a layout of its own; `sent` and `received` are bytes of payloads a step, by rank."""
    setting, span = plan.setting, plan.teacher_span
    if setting.own_layout is None or setting.payload is None or span is None:
        return None
    return {
        "layout": vars(setting.own_layout) | {"processes": setting.own_layout.world_size},
        "first_rank": setting.layouts.first,
        "payload": {
            "bytes_per_token": setting.payload.bytes_per_position,
            "sent": payloads_sent(setting),
            "received": payloads_received(setting),
        },
        "memory": [_memory(one) for one in plan.teacher_memory],
        "flops": plan.teacher_flops,
        "traffic": _sent(plan.teacher_traffic),
        "seconds": span.seconds,
        "hidden_seconds": plan.hidden_seconds,
    }


def _own_layout(plan: Plan) -> Iterator[str]:
    """Lines about a teacher in a layout of its own."""
    setting, span = plan.setting, plan.teacher_span
    if setting.own_layout is None or setting.payload is None or span is None:
        return
    yield f"{'teacher':10} {setting.layouts}"
    form, tensor = setting.payload, setting.layout.tensor
    sent, received = (max(each(setting).values(), default=0) for each in (payloads_sent, payloads_received))
    yield (
        f"{'payload':10} {form.kind}, {form.bytes_per_position} bytes a response token to each of {tensor} rank"
        f"{'s' if tensor > 1 else ''}; a step: {sent / 1e9:,.3g} GB from the busiest sender, {received / 1e9:,.3g} "
        "GB to the busiest receiver"
    )
    if setting.separate:
        hidden = f"{plan.hidden_seconds:.3g} s of them while the student scores and trains"
        yield f"{'':10} scores for {span.total:.3g} s a step, {hidden}"


def _models(plan: Plan) -> list[tuple[str, Architecture]]:
    setting = plan.setting
    models = [("student", setting.student), ("teacher", setting.teacher), ("reference", setting.reference)]
    return [(role, arch) for role, arch in models if arch is not None]


def _heading(plan: Plan) -> list[str]:
    layout, work = plan.setting.layout, plan.setting.workload
    lines = []
    for role, arch in _models(plan):
        total = f"{arch.parameter_count() / 1e9:.2f} B parameters"
        active = f", {arch.parameter_count(active=True) / 1e9:.2f} B active" if arch.moe else ""
        lines.append(f"{role:10} {arch.family}, {arch.num_layers} layers, {total}{active}")
    if plan.setting.teacher is None:
        size = f"{payload_bytes(plan.setting)} bytes a response token"
        lines.append(f"{'teacher':10} behind SGLang servers, which give {size}")
    if not plan.setting.own_rollouts:
        lines.append(f"{'rollouts':10} by SGLang servers")
    plural = "es" if layout.world_size > 1 else ""
    lines.append(f"{'layout':10} {layout}: {layout.world_size} process{plural} on {plan.hardware.name}")
    lines += _own_layout(plan)
    lines.append(
        f"{'step':10} {work.responses} responses of {work.response} tokens to prompts of {work.prompt}; "
        f"a replica: {work.updates} x {work.microbatches} microbatches of {work.pack.tokens} tokens"
    )
    return lines


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _parts(plan: Plan) -> Iterator[tuple[str, Table]]:
    """Of the fullest rank of the student and, if there are any, of the teacher's own."""
    for stages in (plan.memory, plan.teacher_memory):
        if stages:
            yield _rank_parts(max(stages, key=lambda stage: stage.total), plan.hardware.usable)


def _rank_parts(memory: StageMemory, usable: int) -> tuple[str, Table]:
    table = Table("part")
    table.add_column("GiB", justify="right")
    table.add_column("of the device", justify="right")
    for name, size in memory.parts.items():
        if size:
            table.add_row(name, _gib(size), f"{size / usable:.1%}")
    table.add_section()
    table.add_row("together", _gib(memory.total), f"{memory.total / usable:.1%}")
    table.add_row("usable", _gib(usable), "")
    return f"Memory of the fullest rank ({memory}, in {memory.phase})", table


def _stages(plan: Plan) -> tuple[str, Table]:
    """Every stage in a row: what is always there, and the peak of each phase with it."""
    table = Table("stage", "layers")
    for name in ("always", *PHASES):
        table.add_column(name, justify="right")
    for memory in [*plan.memory, *plan.teacher_memory]:
        setting = plan.setting.teaching if memory.teaches else plan.setting
        arch = setting.teacher if memory.teaches else setting.student
        assert arch is not None
        always = sum(memory.always.values())
        layers = stage_layers(arch, setting.layout)
        peaks = (_gib(always + sum(memory.phases[phase].values())) for phase in PHASES)
        name = f"teacher {memory.stage}" if memory.teaches else str(memory.stage)
        table.add_row(name, str(layers), _gib(always), *peaks)
    return "GiB by pipeline stage and phase", table


def _time(plan: Plan) -> tuple[str, Table]:
    table = Table("phase")
    for name in ("seconds", "share", *LIMITS):
        table.add_column(name, justify="right")
    for name, span in plan.spans.items():
        limits = (f"{span.seconds[limit]:.2f}" if span.seconds[limit] else "" for limit in LIMITS)
        table.add_row(name, f"{span.total:.2f}", f"{span.total / plan.seconds:.0%}", *limits)
    table.add_section()
    table.add_row("step", f"{plan.seconds:.2f}", "", *([""] * len(LIMITS)))
    return "Seconds of a step, by what bounds them", table


def _traffic(plan: Plan) -> Iterator[tuple[str, Table]]:
    """Of the student's ranks and of the layout of a teacher that has its own."""
    yield _busiest("stage", plan.traffic, plan.flops, plan.setting)
    if plan.teacher_traffic:
        yield _busiest("the teacher's stage", plan.teacher_traffic, plan.teacher_flops, plan.setting.teaching)


def _busiest(
    name: str, traffic: list[list[Traffic]], flops: list[dict[str, float]], setting: Setting
) -> tuple[str, Table]:
    """Of the stage that sends the most, phases and equal kinds together."""
    totals = [sum(one.sent for one in stage) for stage in traffic]
    stage = totals.index(max(totals))
    work = sum(flops[stage].values()) / 1e15
    title = f"What a rank of {name} {stage} sends in a step; it computes {work:,.3g} PFLOP"
    table = Table("group", "ranks", "kind")
    for name in ("calls", "GB sent"):
        table.add_column(name, justify="right")
    merged: dict[tuple[str, str], list[Traffic]] = {}
    for one in traffic[stage]:
        merged.setdefault((one.group, one.kind), []).append(one)
    sizes = group_sizes(setting)
    for (group, kind), parts in sorted(merged.items(), key=lambda item: -sum(one.sent for one in item[1])):
        sent, calls = sum(one.sent for one in parts), sum(one.calls for one in parts)
        table.add_row(group, str(sizes[group]), kind, f"{calls:,.0f}", f"{sent / 1e9:,.2f}")
    return title, table
