"""Speed, memory and traffic of one training update as processes, sequences and microbatches grow.

Beside each stands what a model of it expects.

    python -m tools.bench.scaling [--layers N] [--hidden N] [--vocab N] [--length N] [--batch N] [--rounds N] [--smoke]

Every case runs in fresh processes of one thread each, in turns with the same update in one process, so that ratios are
of runs side by side; times are the slowest rank's, ratios medians over the rounds. Memory is a rank's weights,
gradients, optimizer state, teacher, and the most that an update has alive besides (`plan_check`).

What is expected:

- Speed. An update takes the longer of (a) the operations of the busiest stage, times (m + (PP - 1) / VPP) / m for m
  microbatches, while the pipeline fills and empties, and (b) the operations of all ranks over the cores of the machine.
  Communication is not in it: what is missing from the ratio is its price here.
- Memory and bytes: those of `megatron-opd plan`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_opd.config.schema import Config
from megatron_opd.plan.flops import stage_flops
from megatron_opd.plan.memory import stage_memory
from megatron_opd.plan.setting import Setting
from megatron_opd.plan.traffic import stage_traffic
from tools.bench.plan_check import Built, Measured, Sizes, config_of, measured, save_configs, training_parts
from tools.bench.traffic import Volume, by_group, group_names, recorded_traffic

MIB = 2**20
FEW_BYTES = 4096  # counts, norms and shapes, which the plan leaves out
OF_UPDATE = ("student forward", "recomputation", "student backward", "heads and objective")
SP2 = {"parallel.tensor": 2, "parallel.sequence_parallel": True}


@dataclass(frozen=True, eq=False)
class Case:
    """An update that differs from the one-process one in its layout or its sizes (factors of the usual ones)."""

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    length: float = 1  # of prompts and responses; the batch changes the other way, the tokens stay
    microbatch: float = 1  # tokens of a microbatch


ONE = Case("1 process")
LAYOUTS = [
    Case("TP 2", {"parallel.tensor": 2}),
    Case("TP 2, SP", SP2),
    Case("PP 2", {"parallel.pipeline": 2}),
    Case("PP 2, VPP 2", {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
    Case("CP 2", {"parallel.context": 2}),
    Case("DP 2", {"parallel.data": 2}),
    Case("TP 2, SP, PP 2", {**SP2, "parallel.pipeline": 2}),
    Case("CP 2, DP 2", {"parallel.context": 2, "parallel.data": 2}),
]
GROWTH = [
    Case("sequences / 2", length=0.5),
    Case("sequences x 2", length=2),
    Case("microbatches / 2", microbatch=0.5),
    Case("microbatches x 2", microbatch=2),
    Case("microbatches x 4", microbatch=4),
]
SMALL = [LAYOUTS[1], LAYOUTS[3], GROWTH[1]]


@dataclass(frozen=True)
class Observed:
    """Of a case: seconds of every round, here and in one process, and what each rank holds and sends."""

    seconds: list[float]
    alone: list[float]
    ranks: list[Measured]
    traffic: list[dict[tuple[str, str], Volume]]

    @property
    def speed(self) -> float:
        """Times the updates a second of one process, the median of rounds."""
        return statistics.median(one / here for one, here in zip(self.alone, self.seconds, strict=True))

    @property
    def fullest(self) -> Measured:
        """The rank with the most memory."""
        return max(self.ranks, key=lambda rank: rank.total)

    @property
    def busiest(self) -> int:
        """The rank that sends the most."""
        sent = [sum(volume.sent_bytes for volume in volumes.values()) for volumes in self.traffic]
        return sent.index(max(sent))


class Crew:
    """The processes of a case: they build its run once and do as told until the block ends."""

    def __init__(self, config: Config, ranks: int) -> None:
        context, self._folder = get_context("spawn"), tempfile.TemporaryDirectory()
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            store = f"file://{self._folder.name}/store"
            process = context.Process(target=_serve, args=(rank, ranks, store, config, theirs), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process, connection in zip(self._processes, self._connections, strict=True):
            connection.close()  # which ends the process, unless it waits for one that has failed
            process.join(10)
            process.kill()
        self._folder.cleanup()

    def ask(self, what: str) -> list[Any]:
        """Every rank's answer. SystemExit when a process has failed; it has printed why."""
        try:
            for connection in self._connections:
                connection.send(what)
            return [connection.recv() for connection in self._connections]
        except (EOFError, ConnectionError):
            raise SystemExit("a process of the bench has failed") from None


def _serve(rank: int, ranks: int, store: str, config: Config, connection: Connection) -> None:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    built = Built.of(config)
    update = built.scored()

    def train() -> None:
        built.update(update)
        built.student.start_step()
        built.student.apply_gradients()

    def seconds() -> float:
        dist.barrier()
        began = time.perf_counter()
        train()
        return time.perf_counter() - began

    def traffic() -> dict[tuple[str, str], Volume]:
        with recorded_traffic() as calls:
            train()
        return by_group(calls, group_names(built.objective.groups))

    answers = {"seconds": seconds, "traffic": traffic, "memory": lambda: measured(built, update)}
    train()  # makes the optimizer's state, and warms up
    while True:
        try:
            what = connection.recv()
        except EOFError:
            break
        connection.send(answers[what]())
    dist.destroy_process_group()


@dataclass(frozen=True)
class Bench:
    """The sizes of the one-process update, and the folder with its models."""

    sizes: Sizes
    rounds: int
    folder: Path

    def config(self, case: Case) -> Config:
        """Of a case; float32, which all machines compute alike."""
        longer = replace(
            self.sizes, length=int(self.sizes.length * case.length), batch=int(self.sizes.batch / case.length)
        )
        tokens = 4 * max(self.sizes.length * case.microbatch, longer.length / 2)
        fixed = {"precision": "fp32", "training.microbatch_tokens": int(tokens)}
        return config_of(self.folder, longer, {**fixed, **case.overrides})

    def setting(self, case: Case) -> Setting:
        """What is planned for a case."""
        return Setting.of(self.config(case), ranks_of(self.config(case)), "cpu")

    def observe(self, case: Case, alone: Crew) -> Observed:
        """Run a case in turns with one process."""
        config = self.config(case)
        with Crew(config, ranks_of(config)) as crew:
            crew.ask("seconds")
            turns = [(max(crew.ask("seconds")), max(alone.ask("seconds"))) for _ in range(self.rounds)]
            here, there = (list(column) for column in zip(*turns, strict=True))
            # What a thread of the communication library frees is not seen to be freed: the least is the truest.
            looks = zip(*(crew.ask("memory") for _ in range(3)), strict=True)
            ranks = [min(look, key=lambda seen: seen.total) for look in looks]
            return Observed(here, there, ranks, crew.ask("traffic"))

    def tokens(self, case: Case) -> int:
        """Of an update, padding left out; sequences of other lengths come close to the same number only."""
        work = self.setting(case).workload
        return work.sequences * self.setting(case).layout.data * (work.prompt + work.response - 1)

    def expected_seconds(self, case: Case) -> float:
        """In operations of one core: see the module's docstring."""
        setting = self.setting(case)
        layout, count = setting.layout, setting.workload.microbatches
        flops = [stage_flops(setting, stage) for stage in range(layout.pipeline)]
        work = [sum(stage.get(part, 0.0) for part in OF_UPDATE) for stage in flops]
        idle = (layout.pipeline - 1) / layout.virtual_pipeline / count
        everyone = sum(work) * layout.world_size / layout.pipeline
        return max(max(work) * (1 + idle), everyone / len(os.sched_getaffinity(0)))

    def expected_bytes(self, case: Case) -> int:
        """Of the fullest rank."""
        setting = self.setting(case)
        stages = [training_parts(stage_memory(setting, stage)) for stage in range(setting.layout.pipeline)]
        return max(sum(parts.values()) for parts in stages)


def ranks_of(config: Config) -> int:
    """Processes of a configuration's layout."""
    parallel = config.parallel
    return parallel.tensor * parallel.pipeline * parallel.context * (parallel.data or 1)


def speed_table(bench: Bench, title: str, observed: dict[Case, Observed], first: Observed) -> Table:
    """A line a case: tokens/s, memory and bytes sent, with what is expected of their ratios to one process."""
    columns = (
        "",
        "processes",
        "tokens/s",
        "x 1 process",
        "expected",
        "MiB of a rank",
        "x",
        "expected",
        "MiB sent",
    )
    table = Table(*columns, title=title)
    alone, held, least = first.fullest.total, bench.expected_bytes(ONE), bench.expected_seconds(ONE)
    for case, found in observed.items():
        tokens = bench.tokens(case)
        more = tokens / bench.tokens(ONE)
        table.add_row(
            case.name,
            str(len(found.ranks)),
            f"{tokens / statistics.median(found.seconds):.0f}",
            f"{more * found.speed:.2f}",
            f"{more * least / bench.expected_seconds(case):.2f}",
            f"{found.fullest.total / MIB:.1f}",
            f"{found.fullest.total / alone:.2f}",
            f"{bench.expected_bytes(case) / held:.2f}",
            f"{sum(volume.sent_bytes for volume in found.traffic[found.busiest].values()) / MIB:.2f}",
        )
    return table


def traffic_table(bench: Bench, observed: dict[Case, Observed]) -> Table:
    """What the busiest rank of a case sends in an update, by group and kind, with what is expected."""
    title = f"one update, the rank that sends most; calls of less than {FEW_BYTES} bytes together left out"
    table = Table("", "group", "kind", "calls", "MiB sent", "expected", title=title)
    for case, found in observed.items():
        expected = expected_traffic(bench.setting(case), found.ranks[found.busiest].stage)
        volumes = found.traffic[found.busiest]
        keys = {key for key, volume in volumes.items() if volume.sent_bytes > FEW_BYTES}
        keys |= {key for key, size in expected.items() if size > FEW_BYTES}
        name = case.name
        for key in sorted(keys):
            volume = volumes.get(key, Volume())
            sizes = (f"{size / MIB:.3f}" for size in (volume.sent_bytes, expected.get(key, 0.0)))
            table.add_row(name, *key, str(volume.calls), *sizes)
            name = ""
        table.add_section()
    return table


def expected_traffic(setting: Setting, stage: int) -> dict[tuple[str, str], float]:
    """(group, kind) -> bytes that a rank of a stage sends in training."""
    found: dict[tuple[str, str], float] = {}
    for one in stage_traffic(setting, stage):
        if one.phase in ("training", "optimizer"):
            found[one.group, one.kind] = found.get((one.group, one.kind), 0.0) + one.sent
    return found


def run(bench: Bench, cases: Sequence[Case]) -> None:
    """Measure the cases and print the tables."""
    save_configs(bench.folder, bench.sizes)
    with Crew(bench.config(ONE), 1) as alone:
        alone.ask("seconds")
        observed = {case: bench.observe(case, alone) for case in [ONE, *cases]}
    layouts = {case: found for case, found in observed.items() if case.overrides}
    console = Console(width=120)
    sizes = ", ".join(f"{name} {value}" for name, value in vars(bench.sizes).items())
    console.print(speed_table(bench, f"one update: {sizes}, fp32", observed, observed[ONE]))
    console.print(traffic_table(bench, layouts))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default in (("layers", 4), ("hidden", 256), ("vocab", 4000), ("length", 128), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--smoke", action="store_true", help="a few cases of tiny models, one round")
    options = vars(parser.parse_args(argv))
    smoke, rounds = options.pop("smoke"), options.pop("rounds")
    sizes = Sizes(4, 128, 500, 16, 8) if smoke else Sizes(**options)
    os.environ["PYTHONWARNINGS"] = "ignore"  # megatron-core's as it is imported, once a process
    with tempfile.TemporaryDirectory() as folder:
        run(Bench(sizes, 1 if smoke else rounds, Path(folder)), SMALL if smoke else [*LAYOUTS, *GROWTH])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
