"""A plan as tables and lines for people, and as one object for machines."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_opd.models.architecture import Architecture
from megatron_opd.plan.advice import Advice, verdict
from megatron_opd.plan.memory import PHASES, StageMemory
from megatron_opd.plan.parameters import stage_layers
from megatron_opd.plan.plan import Plan
from megatron_opd.plan.timing import LIMITS
from megatron_opd.plan.traffic import Traffic, group_sizes, payload_bytes

ASSUMED = (
    "Taken: every prompt and response has its longest length (an upper bound); microbatches are full; tokens spread "
    "evenly over the experts; communication overlaps with nothing; a group that reaches beyond a node runs at the "
    "speed between nodes. Segments are equally long: without transformer-engine attention pads uneven ones, which "
    "takes more. Evaluation and checkpoints are left out."
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
        _parts(plan.fullest, plan.hardware.usable),
        _stages(plan),
        _time(plan),
        _traffic(plan),
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
        "memory": [
            {
                "stage": one.stage,
                "total": one.total,
                "peak": one.phase,
                "always": one.always,
                "phases": one.phases,
            }
            for one in plan.memory
        ],
        "flops": plan.flops,
        "traffic": [[vars(one) | {"sent": one.sent} for one in stage] for stage in plan.traffic],
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
    lines.append(
        f"{'step':10} {work.responses} responses of {work.response} tokens to prompts of {work.prompt}; "
        f"a replica: {work.updates} x {work.microbatches} microbatches of {work.pack.tokens} tokens"
    )
    return lines


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _parts(memory: StageMemory, usable: int) -> tuple[str, Table]:
    table = Table("part")
    table.add_column("GiB", justify="right")
    table.add_column("of the device", justify="right")
    for name, size in memory.parts.items():
        if size:
            table.add_row(name, _gib(size), f"{size / usable:.1%}")
    table.add_section()
    table.add_row("together", _gib(memory.total), f"{memory.total / usable:.1%}")
    table.add_row("usable", _gib(usable), "")
    return f"Memory of the fullest rank (stage {memory.stage}, in {memory.phase})", table


def _stages(plan: Plan) -> tuple[str, Table]:
    """Every stage in a row: what is always there, and the peak of each phase with it."""
    table = Table("stage", "layers")
    for name in ("always", *PHASES):
        table.add_column(name, justify="right")
    for memory in plan.memory:
        always = sum(memory.always.values())
        layers = stage_layers(plan.setting.student, plan.setting.layout)
        peaks = (_gib(always + sum(memory.phases[phase].values())) for phase in PHASES)
        table.add_row(str(memory.stage), str(layers), _gib(always), *peaks)
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


def _traffic(plan: Plan) -> tuple[str, Table]:
    """Of the stage that sends the most, phases and equal kinds together."""
    totals = [sum(one.sent for one in stage) for stage in plan.traffic]
    stage = totals.index(max(totals))
    work = sum(plan.flops[stage].values()) / 1e15
    title = f"What a rank of stage {stage} sends in a step; it computes {work:,.3g} PFLOP"
    table = Table("group", "ranks", "kind")
    for name in ("calls", "GB sent"):
        table.add_column(name, justify="right")
    merged: dict[tuple[str, str], list[Traffic]] = {}
    for one in plan.traffic[stage]:
        merged.setdefault((one.group, one.kind), []).append(one)
    sizes = group_sizes(plan.setting)
    for (group, kind), parts in sorted(merged.items(), key=lambda item: -sum(one.sent for one in item[1])):
        sent, calls = sum(one.sent for one in parts), sum(one.calls for one in parts)
        table.add_row(group, str(sizes[group]), kind, f"{calls:,.0f}", f"{sent / 1e9:,.2f}")
    return title, table
