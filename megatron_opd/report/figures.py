"""Figures of the report: panels of lines drawn by matplotlib, as SVG that takes the page's colours, and as PNG."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

# Of the runs, in order; in SVG they and the inks become variables of the page's style sheet.
COLOURS = ("#2f6fb5", "#c8501e", "#2a8a4a", "#9a4fb0", "#a87b08", "#0f8f8f", "#c2375d", "#6b6b6b")
INK, MUTED, GRID = "#222222", "#76777a", "#e4e4e7"
VARIABLES = {colour: f"var(--run-{i})" for i, colour in enumerate(COLOURS)} | {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
}
SIZE = (4.6, 2.75)  # inches
CROWDED = 60  # points, from which a line has no markers
LONG = 150  # points, from which a curve is drawn pale below its moving average
FONT = re.compile(r"font-family: [^;\"]*;?")
OWN_ID = re.compile(r' id="(?![mp][0-9a-f]{10}")[^"]*"')


@dataclass(frozen=True)
class Line:
    """One line of a panel. `run` is the number of its colour."""

    x: Sequence[float]
    y: Sequence[float]
    run: int = 0
    label: str = ""
    style: str = "-"
    markers_only: bool = False
    curve: bool = False  # a number a step: noisy, and long


@dataclass(frozen=True)
class Panel:
    """A figure with one pair of axes. `name` is that of its PNG; `note` says in a line what is drawn."""

    name: str
    title: str
    lines: Sequence[Line]
    note: str = ""
    x_label: str = "optimizer step"
    ticks: Sequence[str] = ()  # names of the places 0, 1, ... on the x axis
    share: bool = False  # of the whole, 0 to 1
    linear: bool = False  # never on a logarithmic scale
    counts: Sequence[
        Sequence[float]
    ] = ()  # a heat map in the place of lines: rows of shares, drawn from below
    rows: Sequence[str] = ()  # names of its rows


def svg_of(panel: Panel) -> str:
    """The panel without its title as an `<svg>` element for a page: no reference to anything outside of it."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.name}):
        figure = _draw(panel, titled=False)
        written = io.StringIO()
        FigureCanvasSVG(figure)
        plain = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=plain)
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<svg [^>]*viewBox", '<svg role="img" viewBox', text, count=1)
    text = re.sub(r' xmlns="[^"]*" version="1.1"', "", text, count=1)
    text = re.sub(r"<style.*?</style>", "", text, count=1, flags=re.DOTALL)
    text = OWN_ID.sub("", FONT.sub("", text)).replace("xlink:href", "href")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return re.sub(r"\s*\n\s*", " ", text)


def write_png(panel: Panel, path: Path) -> None:
    """The panel with its title as a picture on white."""
    figure = _draw(panel, titled=True)
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=160)


def _draw(panel: Panel, *, titled: bool) -> Figure:
    figure = Figure(figsize=SIZE)
    top, bottom = 0.88 if titled else 0.97, 0.27 if _rotated(panel) else 0.19
    axes = figure.add_axes((0.135, bottom, 0.835, top - bottom))
    if panel.counts:
        _draw_heat(axes, panel)
    else:
        for line in panel.lines:
            _draw_line(axes, line)
        _scale(axes, panel)
    _style(axes, panel)
    if titled:
        axes.set_title(panel.title, loc="left", color=INK, fontsize=9, weight="bold")
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1:
            axes.legend(handles, labels, frameon=False, fontsize=7, labelcolor=INK)
    return figure


def _draw_line(axes: Axes, line: Line) -> None:
    colour = COLOURS[line.run % len(COLOURS)]
    markers = line.markers_only or len(line.x) <= CROWDED
    settings: dict[str, Any] = {
        "color": colour,
        "linestyle": "" if line.markers_only else line.style,
        "label": line.label,
    }
    if line.curve and len(line.x) > LONG:
        axes.plot(line.x, line.y, color=colour, linewidth=0.8, alpha=0.3)
        axes.plot(line.x, _smoothed(line.y), linewidth=1.6, **settings)
        return
    marker: dict[str, Any] = {
        "marker": "D" if line.markers_only else "o",
        "markersize": 4.5 if line.markers_only else 2.6,
    }
    axes.plot(line.x, line.y, linewidth=1.5, **settings, **(marker if markers else {}))


def _smoothed(values: Sequence[float]) -> list[float]:
    """The mean of the last tenth of the points so far, at most 50."""
    window, means = max(1, min(50, len(values) // 10)), []
    for i in range(len(values)):
        recent = values[max(0, i + 1 - window) : i + 1]
        means.append(sum(recent) / len(recent))
    return means


def _scale(axes: Axes, panel: Panel) -> None:
    values = [value for line in panel.lines for value in line.y]
    if panel.share:
        axes.set_ylim(-0.02, 1.02)
    elif values and not panel.linear and 0 < 30 * min(values) < max(values):
        axes.set_yscale("log")
    elif values and min(values) >= 0 and min(values) < 0.6 * max(values):
        axes.set_ylim(0, 1.07 * max(values))


def _draw_heat(axes: Axes, panel: Panel) -> None:
    """Shares as rectangles of more or less colour, so that the page's background shows through."""
    run = panel.lines[0].run if panel.lines else 0
    largest = max((share for row in panel.counts for share in row), default=0.0) or 1.0
    for y, row in enumerate(panel.counts):
        for x, share in enumerate(row):
            if share > 0:
                alpha = 0.06 + 0.94 * share / largest
                axes.bar(x, 0.92, 0.94, y - 0.46, color=COLOURS[run % len(COLOURS)], alpha=alpha, linewidth=0)
    axes.set_xlim(-0.6, len(panel.ticks) - 0.4)
    axes.set_ylim(-0.6, len(panel.counts) - 0.4)
    axes.set_yticks(range(len(panel.rows)), panel.rows)


def _style(axes: Axes, panel: Panel) -> None:
    """Frame, grid and the names of places, drawn as texts: matplotlib's own ticks take most of the time of a figure."""
    axes.set_xlabel(panel.x_label, color=MUTED, fontsize=9, labelpad=31 if _rotated(panel) else 17)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.margins(x=0.03)
    log = axes.get_yscale() == "log"
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    rows: list[tuple[float, str]] = list(enumerate(panel.rows)) or [
        (place, _plain(place)) for place in _places(low, high, log=log)
    ]
    columns: list[tuple[float, str]] = list(enumerate(panel.ticks)) or [
        (x, _plain(x)) for x in _places(left, right, whole=True)
    ]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(NullLocator())
        axis.set_minor_locator(NullLocator())
    beside, below = axes.get_yaxis_transform(), axes.get_xaxis_transform()
    settings: dict[str, Any] = {"color": MUTED, "fontsize": 9}
    for y, name in rows:
        axes.text(-0.015, y, name, transform=beside, ha="right", va="center", **settings)
    for x, name in columns:
        if _rotated(panel):
            axes.text(x + 0.3, -0.03, name, transform=below, ha="right", va="top", rotation=35, **settings)
        else:
            axes.text(x, -0.03, name, transform=below, ha="center", va="top", **settings)
    if not panel.counts:
        heights = [y for y, _ in rows]
        axes.hlines(heights, 0, 1, transform=beside, color=GRID, linewidth=0.7, zorder=0.5)
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)


def _places(low: float, high: float, *, log: bool = False, whole: bool = False) -> list[float]:
    """Where an axis has names: round numbers, powers of ten on a logarithmic one."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1,) if high > 100 * low else (1, 2, 5)
        found = [factor * 10.0**power for power in powers for factor in factors]
    else:
        round_numbers = MaxNLocator(6, integer=whole, steps=[1, 2, 2.5, 5, 10])
        found = [float(place) for place in round_numbers.tick_values(low, high)]
    return [place for place in found if low <= place <= high]


def _plain(place: float) -> str:
    return f"{round(place, 12):g}".replace("-", "−")


def _rotated(panel: Panel) -> bool:
    """Whether the names of the ticks are too long to stand side by side."""
    return max(map(len, panel.ticks), default=0) * len(panel.ticks) > 60
