"""report.html: one page that says what one or several runs did, and opens without a network."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_opd.report.coloured import decoder_of, sample_sections
from megatron_opd.report.curves import Group, curve_groups, step_seconds
from megatron_opd.report.figures import COLOURS, Panel, svg_of, write_png
from megatron_opd.report.profiles import profile_groups
from megatron_opd.report.progress import format_duration
from megatron_opd.report.runs import PHASES, Decode, Run, load_runs
from megatron_opd.report.style import style_sheet

REPORT_FILE = "report.html"
HELDOUT = ("eval/reverse_kl", "eval/reverse_kl_sampled")
PHASE_COLOURS = ("#4c86c6", "#d9a531", "#3f9e5f", "#9a9aa0", "#b06fb8")
OWN_TO_A_RUN = ("run_dir",)  # settings whose difference says nothing


def write_report(folders: Sequence[Path], out: Path, decode: Decode | None = None) -> list[Panel]:
    """Write the page and return its figures. `decode` reads the tokens of all runs; without it tokenizers are sought.

    UserError for a run directory that is none, or that is damaged. OSError where the disk refuses.
    """
    runs = load_runs(folders)
    curves, profiles = curve_groups(runs), profile_groups(runs)
    sections = {
        "summary": ("Summary", _summary(runs)),
        "curves": ("Curves", _figures(curves)),
        "positions": ("By position", _positions(runs, profiles)),
        "samples": ("Samples", _samples(runs, decode)),
        "time": ("Where the time goes", _phases(runs)),
        "settings": ("Settings", _settings(runs)),
    }
    page = _page(runs, sections)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(out.name + ".tmp")
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, out)
    return [panel for group in (*curves, *profiles) for panel in group.panels]


def write_pictures(panels: Sequence[Panel], folder: Path) -> None:
    """Every figure as a PNG in the folder."""
    for panel in panels:
        write_png(panel, folder / f"{panel.name}.png")


def _page(runs: Sequence[Run], sections: Mapping[str, tuple[str, str]]) -> str:
    title = " · ".join(run.name for run in runs)
    key = "".join(f"<span>{_dot(i)}{escape(run.name)}</span>" for i, run in enumerate(runs))
    links = "".join(f"<a href='#{name}'>{heading}</a>" for name, (heading, _) in sections.items())
    body = "".join(
        f"<section id='{name}'><h2>{heading}</h2>{content}</section>"
        for name, (heading, content) in sections.items()
    )
    return (
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)} – megatron-opd</title><style>{style_sheet()}</style></head><body>"
        f"<header><h1>{escape(title)}</h1><p class='note'>On-policy distillation with megatron-opd</p></header>"
        f"<nav><div>{links}<span class='key'>{key}</span></div></nav><main>{body}</main>"
        "<footer>Written by megatron-opd report.</footer></body></html>\n"
    )


def _dot(number: int) -> str:
    return f"<i class='dot' style='background:var(--run-{number % len(COLOURS)})'></i>"


def _figures(groups: Sequence[Group]) -> str:
    parts = []
    for group in groups:
        figures = "".join(
            f"<figure><figcaption><b>{escape(panel.title)}</b><span>{escape(panel.note)}</span></figcaption>"
            f"{svg_of(panel)}</figure>"
            for panel in group.panels
        )
        parts.append(f"<h3>{escape(group.title)}</h3><div class='grid'>{figures}</div>")
    return "".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """Cells are HTML; the last `numbers` columns are set as numbers."""
    first = len(head) - numbers

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if i >= first else ''}>{cell}</{tag}>" for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{line(head, 'th')}</tr></thead><tbody>{body}</tbody></table></div>"


def _summary(runs: Sequence[Run]) -> str:
    head = ["run", "teacher → student", "objective", "steps", "tokens", "training KL", "held-out KL", "time"]
    rows = []
    for number, run in enumerate(runs):
        models = "<br>→ ".join(_models(run, role) for role in ("teacher", "student"))
        seconds = sum(step_seconds(run)[1])
        training = next(
            (s for s in ("reverse_kl", "reverse_kl_sampled", "topk_divergence") if run.series(s)[1]), "loss"
        )
        held_out = next((name for name in HELDOUT if run.series(name)[1]), HELDOUT[0])
        tokens = sum(row.get("tokens") or 0 for row in run.steps)
        last = str(max((row["step"] for row in run.rows), default=0))
        change = (_change(run.series(name)[1]) for name in (training, held_out))
        cells = [f"{_dot(number)}{escape(run.name)}", models, _objective(run), last, f"{tokens:,}", *change]
        rows.append([*cells, format_duration(seconds) if seconds else "–"])
    note = "<p class='note'>KL in nats per token, at the first and at the last measurement.</p>"
    return note + _table(head, rows, numbers=5)


def _models(run: Run, role: str) -> str:
    """The folder's name; of several teachers the names that the configuration gives them."""
    path = run.config.get(f"{role}.path")
    several = [key.removeprefix(f"{role}.paths.") for key in run.config if key.startswith(f"{role}.paths.")]
    name = Path(str(path)).name if path else ", ".join(several)
    return f"<span class='model'>{escape(name)}</span>"


def _objective(run: Run) -> str:
    names = ("objective.preset", "objective.divergence", "objective.support", "objective.token_weight.kind")
    shown = [str(run.config[name]) for name in names if run.config.get(name) is not None]
    return escape(" · ".join(shown))


def _change(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{values[0]:.3f} → <b>{values[-1]:.3f}</b>" if len(values) > 1 else f"{values[0]:.3f}"


def _positions(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    without = [run.name for run in runs if not run.positions]
    note = f"Nothing is recorded by position of: {', '.join(without)}." if without else ""
    about = (
        "Means over the tokens of the first and of the last tenth of the steps. A response's places are counted in "
        "tenths of its length, and in buckets that double."
    )
    return f"<p class='note'>{about} {escape(note)}</p>{_figures(groups)}"


def _samples(runs: Sequence[Run], decode: Decode | None) -> str:
    choices = (("gap", "log-gap", True), ("weight", "token weight", False), ("none", "nothing", False))
    radios = "".join(
        f"<label><input type='radio' name='by' id='by-{name}'{' checked' if chosen else ''}> {label}</label>"
        for name, label, chosen in choices
    )
    scales = (
        "<span class='scale of-gap'>teacher finds it less likely<i class='g'></i>more likely</span>"
        "<span class='scale of-weight'>least weight<i class='w'></i>most</span>"
    )
    parts = [f"<div class='choose'>Colour tokens by {radios}{scales}</div>"]
    for number, run in enumerate(runs):
        heading = f"<h3>{_dot(number)}{escape(run.name)}</h3>" if len(runs) > 1 else ""
        parts.append(heading + sample_sections(run, number, decode or decoder_of(run)))
    return "".join(parts)


def _phases(runs: Sequence[Run]) -> str:
    """Bars of the mean seconds of a step by phase, all to one scale, and the numbers."""
    means = [{phase: _mean([row.get(phase) or 0.0 for row in run.steps]) for phase in PHASES} for run in runs]
    longest = max((sum(each.values()) for each in means), default=0.0) or 1.0
    colours = dict(zip(PHASES, PHASE_COLOURS, strict=True))
    bars, rows = [], []
    for number, (run, each) in enumerate(zip(runs, means, strict=True)):
        parts = "".join(
            f"<i style='width:{100 * seconds / longest:.2f}%;background:{colours[phase]}' title='{PHASES[phase]}'></i>"
            for phase, seconds in each.items()
        )
        total = sum(each.values())
        bars.append(
            f"<span>{_dot(number)}{escape(run.name)}</span><div class='bar'>{parts}</div><span>{total:.2f} s</span>"
        )
        others = sum(row.get("eval/seconds") or 0.0 for row in run.rows)
        cells = [f"{seconds:.2f} s ({seconds / total:.0%})" if total else "–" for seconds in each.values()]
        rows.append([f"{_dot(number)}{escape(run.name)}", *cells, f"{total:.2f} s", format_duration(others)])
    legend = "".join(
        f"<span><i class='dot' style='background:{colours[phase]}'></i>{label}</span>"
        for phase, label in PHASES.items()
    )
    head = ["run", *PHASES.values(), "step", "evaluations, all"]
    note = "<p class='note'>Mean of a step. Starting up is not counted.</p>"
    numbers = _table(head, rows, len(head) - 1)
    return f"{note}<div class='bars'>{''.join(bars)}<div class='phases'>{legend}</div></div>{numbers}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _settings(runs: Sequence[Run]) -> str:
    """What the runs do not have in common, and everything, folded."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    differing = [
        key
        for key in keys
        if key not in OWN_TO_A_RUN and len({repr(run.config.get(key)) for run in runs}) > 1
    ]
    head = ["setting", *(f"{_dot(i)}{escape(run.name)}" for i, run in enumerate(runs))]

    def table(names: Sequence[str]) -> str:
        rows = [
            [f"<code>{escape(key)}</code>", *(_setting(run.config.get(key)) for run in runs)] for key in names
        ]
        return _table(head, rows)

    parts = []
    if len(runs) > 1:
        same = "<p class='note'>The runs have the same settings.</p>"
        parts.append(f"<h3>Differences</h3>{table(differing) if differing else same}")
    parts.append(f"<details><summary>all {len(keys)} settings</summary>{table(keys)}</details>")
    return "".join(parts)


def _setting(value: Any) -> str:
    return "<span class='note'>–</span>" if value is None else f"<code>{escape(str(value))}</code>"
