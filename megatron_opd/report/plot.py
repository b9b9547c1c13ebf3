"""The picture of a run: curve.png, drawn from metrics.jsonl."""

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_opd.errors import UserError
from megatron_opd.report.metrics import METRICS_FILE, read_metrics

TRAIN, HELDOUT, INK, MUTED = "#4477aa", "#cc3311", "#222222", "#777777"
DISTANCES = {  # metric -> axis; the first that a run has is drawn
    "reverse_kl": "reverse KL (nats per token)",
    "reverse_kl_sampled": "reverse KL, from sampled tokens (nats per token)",
    "topk_divergence": "divergence on the support (nats per token)",
}
PHASES = (  # metric, label, colour
    ("rollout_seconds", "rollout", "#4477aa"),
    ("teacher_seconds", "teacher", "#ddaa33"),
    ("train_seconds", "training", "#228833"),
    ("sync_seconds", "weight sync", "#bbbbbb"),
)


def plot_curve(run_dir: Path) -> Path:
    """Draw `run_dir/curve.png` and return its path.

    Above: reverse KL on the training prompts of every step and on held-out prompts at evaluations, both on
    the student's own rollouts; with a teacher behind servers its estimate, or the divergence on the support. Below:
    the gradient norm, and where the seconds of a step go. Raises UserError when there is nothing to draw.
    """
    rows = read_metrics(run_dir)
    distance = next(
        (name for name in DISTANCES if any(name in row or f"eval/{name}" in row for row in rows)), None
    )
    if distance is None:
        raise UserError(f"{run_dir / METRICS_FILE}: holds no reverse_kl yet; train at least one step first")
    figure = Figure(figsize=(9, 6.5), layout="constrained", dpi=150)
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(2.2, 1))
    _draw_distance(figure.add_subplot(grid[0, :]), rows, distance)
    _draw_grad_norm(figure.add_subplot(grid[1, 0]), rows)
    _draw_seconds(figure.add_subplot(grid[1, 1]), rows)
    path = run_dir / "curve.png"
    aside = run_dir / "curve.png.tmp"
    with aside.open("wb") as file:
        canvas.print_png(file)
    aside.replace(path)
    return path


def _series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _draw_distance(axes: Axes, rows: list[dict[str, Any]], name: str) -> None:
    steps, values = _series(rows, name)
    crowded = len(steps) > 60
    axes.plot(
        steps,
        values,
        color=TRAIN,
        linewidth=1.6,
        marker=None if crowded else "o",
        markersize=3,
        label="training prompts",
    )
    held_steps, held_values = _series(rows, f"eval/{name}")
    if held_steps:
        axes.plot(
            held_steps,
            held_values,
            color=HELDOUT,
            linestyle="",
            marker="D",
            markersize=6,
            label="held-out prompts",
        )
        for index in {0, len(held_steps) - 1}:
            right = index > 0
            axes.annotate(
                f"{held_values[index]:.2f}",
                (held_steps[index], held_values[index]),
                color=HELDOUT,
                weight="bold",
                xytext=(-8 if right else 8, 8),
                textcoords="offset points",
                ha="right" if right else "left",
            )
    drawn = [0.0, *values, *held_values]
    axes.set_ylim(1.08 * min(drawn), 1.08 * max(*drawn, 1e-6))
    axes.set_title(
        "Distance of the student from its teacher, on the student's own rollouts", loc="left", color=INK
    )
    _label(axes, DISTANCES[name])
    axes.legend(frameon=False)


def _draw_grad_norm(axes: Axes, rows: list[dict[str, Any]]) -> None:
    steps, values = _series(rows, "grad_norm")
    if values:
        axes.plot(steps, values, color=INK, linewidth=1.2)
        if min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
    _label(axes, "gradient norm")


def _draw_seconds(axes: Axes, rows: list[dict[str, Any]]) -> None:
    timed = [row for row in rows if any(name in row for name, _, _ in PHASES)]
    present = [phase for phase in PHASES if any(row.get(phase[0]) for row in timed)]
    if present:
        axes.stackplot(
            [row["step"] for row in timed],
            *([row.get(name) or 0.0 for row in timed] for name, _, _ in present),
            labels=[label for _, label, _ in present],
            colors=[colour for _, _, colour in present],
            step="mid" if len(timed) > 1 else None,
        )
        totals = sorted(sum(row.get(name) or 0.0 for name, _, _ in present) for row in timed)
        # The first step warms caches up and may take several times as long: do not let it set the scale.
        axes.set_ylim(0, 1.6 * totals[math.ceil(0.9 * (len(totals) - 1))])
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize="small", ncols=2, loc="upper right")
    _label(axes, "seconds per step")


def _label(axes: Axes, what: str) -> None:
    axes.set_xlabel("optimizer step", color=INK)
    axes.set_ylabel(what, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
