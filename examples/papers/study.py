"""Runs a study: every variant of a configuration with every seed, each as `megatron-opd train` would run it.

Runs have one thread each, and as many run at once as there are cores. A run that is finished is not done again, so an
interrupted study goes on where it was. What a study found is `results.json`: means over the seeds with their standard
errors.
"""

import json
import math
import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from megatron_opd.errors import UserError
from megatron_opd.report.metrics import read_metrics

SOLVED, HELDOUT_KL = "eval/chain/avg@1", "eval/reverse_kl"

Changes = Mapping[str, Any]
"""Dotted keys of a configuration -> values."""


@dataclass(frozen=True)
class Run:
    """One training: the variant it belongs to, its seed, and its configuration."""

    variant: str
    seed: int
    folder: Path
    changes: Changes = field(hash=False)

    @property
    def steps(self) -> int:
        """The steps of the training."""
        return int(self.changes["training.steps"])

    def rows(self) -> list[dict[str, Any]]:
        """The run's metrics, a row a step."""
        return read_metrics(self.folder)

    @property
    def finished(self) -> bool:
        """Whether it has left its report, the last thing that a run does, with this very configuration."""
        written = self.folder / "report.html"
        return written.is_file() and self.config_file.read_text() == self.settings

    @property
    def config_file(self) -> Path:
        """Where its configuration lies."""
        return self.folder.with_suffix(".yaml")

    @property
    def settings(self) -> str:
        """Its configuration as YAML."""
        tree: dict[str, Any] = {"run_dir": str(self.folder)}
        for key, value in self.changes.items():
            *sections, name = key.split(".")
            section = tree
            for each in sections:
                section = section.setdefault(each, {})
            section[name] = value
        return yaml.safe_dump(tree, sort_keys=False)

    def prepare(self) -> "Call":
        """Write the configuration, and say how the run is done. What is left of a run with another one is deleted."""
        if self.config_file.is_file() and self.config_file.read_text() != self.settings:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.config_file.parent.mkdir(parents=True, exist_ok=True)
        self.config_file.write_text(self.settings)
        return Call(("train", str(self.config_file)), self.folder.with_suffix(".log"))


@dataclass(frozen=True)
class Call:
    """A call of `megatron-opd`: its arguments, and the file for what it prints."""

    arguments: tuple[str, ...]
    log: Path


def runs_of(folder: Path, variants: Mapping[str, Changes], seeds: Sequence[int], base: Changes) -> list[Run]:
    """All runs of a study, seed by seed, so that an early look shows every variant."""
    return [
        Run(name, seed, folder / _slug(name) / f"seed-{seed}", {**base, **changes, "seed": seed})
        for seed in seeds
        for name, changes in variants.items()
    ]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def train(runs: Sequence[Run], console: Console) -> None:
    """Do the runs that are not finished. Raises UserError naming one that fails."""
    carry_out([run.prepare() for run in runs if not run.finished], console)


def carry_out(calls: Sequence[Call], console: Console) -> None:
    """Do the calls, as many at once as there are cores, each with one thread. Raises UserError for one that fails."""
    if not calls:
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    # megatron-core names the optional packages that it lacks
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["megatron_opd.train", "megatron_opd.cli"]
    )  # imports take longer than a small run
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
    ):
        task = progress.add_task("runs", total=len(calls))
        try:
            for done in as_completed([pool.submit(_wait_for, call, context) for call in calls]):
                call, code = done.result()
                if code:
                    raise UserError(
                        f"megatron-opd {' '.join(call.arguments)} has failed ({code}): see {call.log}"
                    )
                progress.advance(task)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _wait_for(call: Call, context: ForkServerContext) -> tuple[Call, int | None]:
    process = context.Process(target=_answer, args=(call,))
    process.start()
    process.join()
    return call, process.exitcode


def _answer(call: Call) -> None:
    from megatron_opd.cli import main

    log = os.open(call.log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    main(list(call.arguments))


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and its standard error; nan with one seed."""

    mean: float
    error: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Of the values, one a seed."""
        mean = sum(values) / len(values)
        spread = sum((value - mean) ** 2 for value in values)
        error = math.sqrt(spread / (len(values) - 1) / len(values)) if len(values) > 1 else math.nan
        return cls(mean, error, len(values))

    def shown(self, digits: int, percent: bool = False) -> str:
        """As text: mean ± error."""
        factor = 100 if percent else 1
        return f"{self.mean * factor:.{digits}f} ± {self.error * factor:.{digits}f}"


def curve(runs: Sequence[Run], name: str) -> dict[int, Mean]:
    """Step -> mean over the runs of a value, wherever all of them have it."""
    each = [{row["step"]: row[name] for row in run.rows() if row.get(name) is not None} for run in runs]
    steps = set.intersection(*(set(values) for values in each))
    return {step: Mean.of([values[step] for values in each]) for step in sorted(steps)}


def by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each variant, in the order of the study."""
    return {
        name: [run for run in runs if run.variant == name] for name in dict.fromkeys(r.variant for r in runs)
    }


def compared(
    title: str,
    runs: Sequence[Run],
    early: int,
    console: Console,
    more: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, dict[str, dict[int, Mean]]]:
    """Metric -> variant -> step -> mean over the seeds; printed at step `early` and at the last.

    Problems solved and held-out reverse KL, and `more`: what is shown -> metric.
    """
    metrics = {"solved": SOLVED, "held-out KL": HELDOUT_KL, **more}
    variants = by_variant(runs)
    found = {
        metric: {name: curve(each, metric) for name, each in variants.items()} for metric in metrics.values()
    }
    last = runs[0].steps
    head = ["", f"solved at step {early}, %", *(f"{name} at {last}" for name in metrics)]
    rows = []
    for name in variants:
        solved = found[SOLVED][name]
        values = [found[metric][name][last].shown(3) for metric in list(metrics.values())[1:]]
        rows.append(
            [name, solved[early].shown(1, percent=True), solved[last].shown(1, percent=True), *values]
        )
    show(title, head, rows, console)
    return found


def figure_of(panels: Mapping[str, Mapping[str, Mapping[int, Mean]]], y: str) -> Figure:
    """A panel for each part of a study, a curve a variant."""
    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
        draw_curves(axes, curves, "step", y)
        axes.set_title(title, fontsize=10)
    return figure


def draw_curves(axes: Axes, curves: Mapping[str, Mapping[Any, Mean]], x: str, y: str) -> None:
    """One line a variant, with its standard error as a band."""
    for name, curve in curves.items():
        places, means = list(curve), list(curve.values())
        (line,) = axes.plot(places, [each.mean for each in means], marker=".", label=name)
        low, high = ([each.mean + sign * each.error for each in means] for sign in (-1, 1))
        axes.fill_between(places, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """Print a table whose first column is text."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def write_results(folder: Path, results: Any) -> None:
    """`results.json`, with every `Mean` as [mean, error, n]."""
    folder.mkdir(parents=True, exist_ok=True)

    def plain(value: Any) -> Any:
        return [value.mean, value.error, value.n] if isinstance(value, Mean) else str(value)

    (folder / "results.json").write_text(json.dumps(results, indent=1, default=plain) + "\n")
