"""Which metrics the report draws over the steps, under which names, and in which group."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_opd.report.figures import Line, Panel
from megatron_opd.report.runs import PHASES, Run

# Metric -> (title, what is drawn); a group has a panel for each that a run has.
LEARNING = {
    "loss": ("Loss", "per response token, as it is minimised"),
    "reverse_kl": ("Reverse KL", "nats per token, training prompts, whole vocabulary"),
    "reverse_kl_sampled": ("Reverse KL, estimated", "nats per token, from the sampled tokens"),
    "topk_divergence": ("Divergence on the support", "nats per token"),
    "forward_kl": ("Forward KL", "nats per token"),
    "jsd": ("Jensen-Shannon divergence", "nats per token"),
    "abs_log_gap": ("|Log-gap|", "mean of |log p teacher − log p student| of the sampled token, nats"),
    "log_gap": ("Log-gap", "mean of log p teacher − log p student of the sampled token, nats"),
}
POLICY = {
    "student_entropy": ("Entropy of the student", "nats per token"),
    "teacher_entropy": ("Entropy of the teacher", "nats per token, on the student's prefixes"),
    "student_logprob": ("Log-probability of sampled tokens", "under the student that drew them, nats"),
    "response_tokens": ("Length of the responses", "tokens, mean"),
    "truncated": ("Clip ratio", "share of the responses that reach the length limit"),
    "student_mass": ("Student's mass on the support", "probability, mean over tokens"),
    "teacher_mass": ("Teacher's mass on the support", "probability, mean over tokens"),
    "gated": ("Gate ratio", "share of the tokens that the gate opens for"),
    "weight": ("Token weight", "mean over tokens"),
}
HEALTH = {
    "grad_norm": ("Gradient norm", "before clipping"),
    "lr": ("Learning rate", ""),
    "logprob_mismatch": ("Rollout against training", "mean |difference of log-probs|, nats"),
    "logprob_mismatch_max": ("Rollout against training, largest", "|difference of log-probs|, nats"),
    "clipped": ("Clipped ratios", "share of the tokens"),
    "importance": ("Importance", "mean of the truncated ratio of training and rollout"),
    "staleness": ("Staleness", "optimizer steps between drawing and training, mean"),
    "skipped": ("Skipped updates", "in a step"),
}
SHARES = ("truncated", "student_mass", "teacher_mass", "gated", "clipped")
LEFT_OUT = ("step", "tokens", "logprob_mismatch_kl", "logprob_mismatch_high", "eval/seconds")


@dataclass(frozen=True)
class Group:
    """Panels under one heading."""

    title: str
    panels: Sequence[Panel]


def curve_groups(runs: Sequence[Run]) -> list[Group]:
    """Everything that the runs have recorded by step; a metric that is not known here has its name for a title."""
    present = list(dict.fromkeys(name for run in runs for name in run.metrics))
    evaluated = {
        name: _of_evaluation(name) for name in present if name.startswith("eval/") and name not in LEFT_OUT
    }
    known = {**LEARNING, **POLICY, **HEALTH, **evaluated}
    others = {
        name: (name.replace("_", " "), "")
        for name in present
        if name not in known and name not in LEFT_OUT and not name.endswith("_seconds")
    }
    groups = [
        Group("Learning", [*_panels(runs, LEARNING), *_panels(runs, evaluated)]),
        Group("Policy", _panels(runs, POLICY)),
        Group("Health", [*_panels(runs, HEALTH), *_panels(runs, others)]),
        Group("Time", _time_panels(runs)),
    ]
    return [group for group in groups if group.panels]


def step_seconds(run: Run) -> tuple[list[int], list[float]]:
    """Steps, and the seconds that each took in all its phases."""
    timed = [row for row in run.steps if any(phase in row for phase in PHASES)]
    return [row["step"] for row in timed], [sum(row.get(phase) or 0.0 for phase in PHASES) for row in timed]


def _of_evaluation(name: str) -> tuple[str, str]:
    shown = {
        "eval/reverse_kl": "Held-out reverse KL",
        "eval/reverse_kl_sampled": "Held-out reverse KL, estimated",
        "eval/response_tokens": "Held-out length of the responses",
    }
    unit = "tokens, mean" if name.endswith("tokens") else "nats per token" if "kl" in name else ""
    return shown.get(name, name.removeprefix("eval/").replace("_", " ")), unit


def _panels(runs: Sequence[Run], names: dict[str, tuple[str, str]]) -> list[Panel]:
    panels = []
    for name, (title, note) in names.items():
        held_out = name.startswith("eval/")
        lines = []
        for number, run in enumerate(runs):
            steps, values = run.series(name)
            if values:
                lines.append(Line(steps, values, number, run.name, curve=not held_out))
        if any(any(line.y) for line in lines):  # not a metric that is 0 throughout
            share = name in SHARES
            panels.append(Panel(name.replace("/", "_"), title, lines, note, share=share, linear=name == "lr"))
    return panels


def _time_panels(runs: Sequence[Run]) -> list[Panel]:
    seconds, speeds = [], []
    for number, run in enumerate(runs):
        steps, totals = step_seconds(run)
        tokens = {row["step"]: row.get("tokens") or 0 for row in run.steps}
        if steps:
            seconds.append(Line(steps, totals, number, run.name, curve=True))
            rates = [
                tokens[step] / total if total else 0.0 for step, total in zip(steps, totals, strict=True)
            ]
            speeds.append(Line(steps, rates, number, run.name, curve=True))
    if not seconds:
        return []
    return [
        Panel("step_seconds", "Time of a step", seconds, "seconds, all phases"),
        Panel("tokens_per_second", "Speed", speeds, "response tokens trained on per second"),
    ]
