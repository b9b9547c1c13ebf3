"""The report's figures by position: values over the response at the start and the end of training, gaps by bucket."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from megatron_opd.report.curves import SHARES, Group
from megatron_opd.report.figures import Line, Panel
from megatron_opd.report.runs import Run

PART = 10  # the start and the end are a tenth of the steps each
# Value -> (title, what is drawn); over tenths of the response, and those of ABSOLUTE over doubling places too.
VALUES = {
    "reverse_kl": ("Reverse KL by position", "nats"),
    "reverse_kl_sampled": ("Reverse KL by position, estimated", "nats, from the sampled tokens"),
    "topk_divergence": ("Divergence on the support by position", "nats"),
    "abs_log_gap": ("|Log-gap| by position", "nats, sampled token"),
    "weight": ("Token weight by position", "factor in the loss"),
    "student_entropy": ("Entropy of the student by position", "nats"),
    "teacher_entropy": ("Entropy of the teacher by position", "nats"),
    "student_logprob": ("Log-probability by position, student", "of the sampled token, nats"),
    "teacher_logprob": ("Log-probability by position, teacher", "of the sampled token, nats"),
    "student_mass": ("Student's mass on the support", "probability"),
    "teacher_mass": ("Teacher's mass on the support", "probability"),
    "gated": ("Gate ratio by position", "share of the tokens"),
}
ABSOLUTE = ("reverse_kl", "reverse_kl_sampled", "topk_divergence", "abs_log_gap", "weight")
TENTHS = [f"{10 * i + 5}%" for i in range(10)]
PARTS = {"start": "--", "end": "-"}


def profile_groups(runs: Sequence[Run]) -> list[Group]:
    """Figures by position of the runs that have recorded them."""
    relative = [_profile(runs, name, "relative") for name in VALUES]
    absolute = [_profile(runs, name, "absolute") for name in ABSOLUTE]
    named = len(runs) > 1
    gaps = [panel for number, run in enumerate(runs) for panel in _gap_panels(run, number, named)]
    prefixes = [_prefix_panel(run, number, named) for number, run in enumerate(runs)]
    groups = [
        Group("Over the response", [panel for panel in relative if panel.lines]),
        Group("Over the first tokens", [panel for panel in absolute if panel.lines]),
        Group("Log-gaps by place", gaps),
        Group("One rollout", [panel for panel in prefixes if panel is not None]),
    ]
    return [group for group in groups if group.panels]


def _prefix_panel(run: Run, number: int, named: bool) -> Panel | None:
    """The log-likelihood of a rollout's prefixes under both models, and their log-ratio; None where it is not known."""
    last = max(run.sample_files, default=0)
    longest: list[tuple[float, float]] = []
    for sample in run.samples(last) if last else []:
        trace = sample.get("trace", {})
        pairs = zip(trace.get("student_logprob", []), trace.get("log_gap", []), strict=False)
        known = [
            (student, student + gap) for student, gap in pairs if student is not None and gap is not None
        ]
        longest = max(longest, known, key=len)
    if len(longest) < 2:
        return None
    student, teacher = (list(accumulate(column)) for column in zip(*longest, strict=True))
    places = list(range(1, len(longest) + 1))
    ratio = [theirs - ours for ours, theirs in zip(student, teacher, strict=True)]
    lines = [
        Line(places, student, number, "student", "-"),
        Line(places, teacher, number, "teacher", "--"),
        Line(places, ratio, number, "log-ratio", ":"),
    ]
    title = f"Prefix log-likelihood, step {last}" + (f" ({run.name})" if named else "")
    note = "of the longest sample, nats: student solid, teacher dashed, log-ratio dotted"
    return Panel(f"prefix_{number}", title, lines, note, x_label="tokens of the prefix")


def average(rows: Sequence[Mapping[str, Any]], where: str, name: str) -> list[float | None]:
    """The mean of a value in each place over the tokens of several steps; None where there are none."""
    places = max((len(row[where]["tokens"]) for row in rows), default=0)
    totals, tokens = [0.0] * places, [0] * places
    for row in rows:
        values = _values(row[where], name)
        for i, (value, count) in enumerate(zip(values, row[where]["tokens"], strict=True)):
            if value is not None:
                totals[i] += value * count
                tokens[i] += count
    return [total / count if count else None for total, count in zip(totals, tokens, strict=True)]


def start_and_end(run: Run) -> dict[str, Sequence[Mapping[str, Any]]]:
    """The rows of the first and the last tenth of the steps; a run of one step has no start."""
    count = max(1, len(run.positions) // PART)
    parts = {"start": run.positions[:count], "end": run.positions[-count:]}
    return parts if len(run.positions) > 1 else {"end": parts["end"]} if run.positions else {}


def _values(table: Mapping[str, Any], name: str) -> list[float | None]:
    if name != "teacher_logprob":
        return list(table.get(name, [None] * len(table["tokens"])))
    both = zip(_values(table, "student_logprob"), _values(table, "log_gap"), strict=True)
    return [None if student is None or gap is None else student + gap for student, gap in both]


def _profile(runs: Sequence[Run], name: str, where: str) -> Panel:
    lines, longest = [], 0
    for number, run in enumerate(runs):
        for part, rows in start_and_end(run).items():
            means = average(rows, where, name)
            known = [(i, mean) for i, mean in enumerate(means) if mean is not None]
            longest = max(longest, len(means))
            if known:
                places, values = zip(*known, strict=True)
                lines.append(Line(places, values, number, f"{run.name}, {part}", PARTS[part]))
    title, unit = VALUES[name]
    note = f"{unit}; start dashed, end solid"
    if where == "relative":
        return Panel(f"relative_{name}", title, lines, note, "place in the response", TENTHS, name in SHARES)
    ticks = bucket_names(longest)
    return Panel(
        f"absolute_{name}", title, lines, note, "token of the response, from 0", ticks, name in SHARES
    )


def bucket_names(count: int) -> list[str]:
    """What the first doubling buckets hold: 0, 1, 2–3, 4–7, ..."""
    return ["0", "1", *(f"{2**i}–{2 ** (i + 1) - 1}" for i in range(1, count))][:count]


def _gap_panels(run: Run, number: int, named: bool) -> list[Panel]:
    """Of the start and the end: how the log-gaps of each bucket of places are distributed."""
    panels = []
    for part, rows in start_and_end(run).items():
        counted = [row["log_gap_counts"] for row in rows if "log_gap_counts" in row]
        if not counted:
            continue
        buckets = max(len(each["counts"]) for each in counted)
        shares = []
        for bucket in range(buckets):
            lines = [each["counts"][bucket] for each in counted if bucket < len(each["counts"])]
            totals = [sum(column) for column in zip(*lines, strict=True)]
            shares.append([total / max(1, sum(totals)) for total in totals])
        title = f"Log-gaps by place, {part}" + (f" ({run.name})" if named else "")
        note = "rows: token of the response; colour: share of them"
        panel = Panel(
            f"gaps_{number}_{part}",
            title,
            [Line([], [], number)],
            note,
            "log p teacher − log p student, nats",
            _gap_names(counted[0]["edges"]),
            counts=shares,
            rows=bucket_names(buckets),
        )
        panels.append(panel)
    return panels


def _gap_names(edges: Sequence[float]) -> list[str]:
    """Names for the bins between the edges: the edge that lies nearer to 0; 0 for the one in the middle."""
    below = [f"{edge:g}" for edge in edges if edge < 0]
    above = [f"{edge:g}" for edge in edges if edge > 0]
    names = [f"<{below[0]}", *below[1:], "0", *above[:-1], f">{above[-1]}"]
    return [name.replace("-", "−") for name in names]
