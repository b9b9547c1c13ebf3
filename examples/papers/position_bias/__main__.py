"""Where in a response supervision counts: the position bias of on-policy distillation (2606.22600, figures 1 to 4).

Supervision of the whole response, of its first 30 % and of its last 30 %; how often teacher and student solve a problem
that they go on with from the first part of the student's response; and the KL by position before and after.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from examples.papers.settings import Study, run_study
from examples.papers.study import (
    SOLVED,
    Call,
    Mean,
    Run,
    by_variant,
    carry_out,
    curve,
    draw_curves,
    show,
    train,
    write_results,
)
from examples.papers.tasks import decode, encode
from megatron_opd.data.rollouts import write_objects
from megatron_opd.report.step_lines import read_steps

WINDOW = {
    "objective.token_weight.gamma": 1.0,
    "objective.token_weight.floor": 0.0,
    "objective.token_weight.fraction": 0.3,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "whole response": {},
    "first 30 %": {"objective.token_weight.kind": "prefix_window", **WINDOW},
    "last 30 %": {"objective.token_weight.kind": "suffix_window", **WINDOW},
}
SHARES = (0.0, 0.25, 0.5, 0.75)  # of the student's response that is given


def study(this: Study) -> None:
    """All of it."""
    runs = this.runs("windows", VARIANTS, this.base("student"))
    train(runs, this.console)
    variants = by_variant(runs)
    solved = {name: curve(each, SOLVED) for name, each in variants.items()}
    continued = continuations(this, variants["whole response"])
    positions = {
        when: kl_by_position(variants["whole response"], last=when == "end") for when in ("start", "end")
    }
    draw(this, solved, continued, positions)
    write_results(
        this.folder,
        {"models": this.solved, "solved": solved, "continued": continued, "kl_by_position": positions},
    )
    rows = [[name, *(solved[name][step].shown(1, percent=True) for step in solved[name])] for name in solved]
    show(
        "Problems solved, %, by step", ["supervised", *map(str, solved["whole response"])], rows, this.console
    )
    rows = [
        [name, *(mean.shown(1, percent=True) for mean in each.values())] for name, each in continued.items()
    ]
    show(
        "Solved from a part of the student's first responses, %",
        ["by", *map(str, SHARES)],
        rows,
        this.console,
    )


def continuations(this: Study, runs: list[Run]) -> dict[str, dict[float, Mean]]:
    """Model -> share of the response given -> share solved, from the responses of the student before the first step."""
    found: dict[str, dict[float, list[float]]] = {
        name: {share: [] for share in SHARES} for name in ("teacher", "student")
    }
    calls, outputs = [], []
    for run in runs:
        config = begun(run)
        for model in found:
            output = config.with_name(model)
            outputs.append((model, output))
            if not (output / "results.json").is_file():
                arguments = (
                    "evaluate",
                    str(config),
                    "--model",
                    str(this.models / model),
                    "--output",
                    str(output),
                )
                calls.append(Call(arguments, config.with_name(f"{model}.log")))
    carry_out(calls, this.console)
    for model, output in outputs:
        for share in SHARES:
            right = [sample["right"] for sample in read_steps(output / f"from-{share}.jsonl")]
            found[model][share].append(sum(right) / len(right))
    return {
        model: {share: Mean.of(each) for share, each in shares.items()} for model, shares in found.items()
    }


def begun(run: Run) -> Path:
    """Problems with a part of the response already written, a task for every share, in a configuration.

    They lie in the folder of the run whose responses they continue, and are gone when it is done again.
    """
    samples = read_steps(run.folder / "evaluation" / "step_00000000" / "chain.jsonl")
    folder, tasks = run.folder / "continued", {}
    for share in SHARES:
        path = folder / f"problems-{share}.jsonl"
        write_objects(path, (continued(sample, share) for sample in samples))
        tasks[f"from-{share}"] = {"path": str(path)}
    config = yaml.safe_load(run.settings)
    config["evaluation"]["tasks"] = tasks
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def continued(sample: Mapping[str, Any], share: float) -> dict[str, str]:
    """The problem of a graded response with this share of the response after it, and its answer."""
    ids = encode(sample["response"])
    return {"problem": sample["prompt"] + decode(ids[: int(share * len(ids))]), "answer": sample["expected"]}


def kl_by_position(runs: list[Run], *, last: bool) -> list[Mean]:
    """Reverse KL in the ten parts of the responses, at the first or the last step."""
    each = [
        read_steps(run.folder / "positions.jsonl")[-1 if last else 0]["relative"]["reverse_kl"]
        for run in runs
    ]
    return [Mean.of([value or 0.0 for value in part]) for part in zip(*each, strict=True)]


def draw(
    this: Study,
    solved: dict[str, dict[int, Mean]],
    continued: dict[str, dict[float, Mean]],
    positions: dict[str, list[Mean]],
) -> None:
    """Three panels: curves of the variants, continuations, KL by position."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw_curves(left, solved, "step", "problems solved")
    draw_curves(middle, continued, "share of the student's response given", "problems solved")
    by_place = {
        when: {(place + 0.5) / len(means): mean for place, mean in enumerate(means)}
        for when, means in positions.items()
    }
    draw_curves(right, by_place, "position in the response", "reverse KL, nats")
    figure.savefig(this.folder / "figure.png", dpi=130)


if __name__ == "__main__":
    sys.exit(run_study("position_bias", __doc__, study))
