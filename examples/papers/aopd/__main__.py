"""Policy gradient where the teacher agrees, forward KL where it does not: AOPD beside OPD and GKD (2605.06387).

From a weak and from a strong start; and what is left of the first task, and of the student's entropy, when a second
task is trained after it.
"""

import sys
from dataclasses import replace
from typing import Any

from examples.papers.settings import Study, run_study
from examples.papers.study import SOLVED, Run, compared, figure_of, train, write_results

VARIANTS: dict[str, dict[str, Any]] = {
    "OPD": {},
    "GKD": {"objective.preset": "gkd"},
    "AOPD": {"objective.preset": "aopd", "objective.k": 8},
}
STARTS = {"weak start": "weak", "strong start": "strong"}
SECOND = "sorting after sums"
SORTED = "eval/sort/avg@1"


def study(this: Study) -> None:
    """All of it."""
    runs: dict[str, list[Run]] = {
        start: this.runs(
            student, VARIANTS, {**this.base(student), "checkpoint.export_hf": student == "strong"}
        )
        for start, student in STARTS.items()
    }
    train([run for each in runs.values() for run in each], this.console)
    second = this.runs("second", VARIANTS, this.base("strong", task="sort"))
    runs[SECOND] = [
        replace(run, changes={**run.changes, "student.path": str(before.folder / "hf")})
        for run, before in zip(second, runs["strong start"], strict=True)
    ]
    train(runs[SECOND], this.console)
    results: dict[str, Any] = {"models": this.solved}
    for stage, each in runs.items():
        more = {"solved of the second": SORTED} if stage == SECOND else {}
        results[stage] = compared(
            stage, each, this.size.every, this.console, {"entropy": "student_entropy", **more}
        )
    panels = {stage: results[stage][SOLVED] for stage in runs}
    figure_of(panels, "sums solved").savefig(this.folder / "figure.png", dpi=130)
    entropy = {stage: results[stage]["student_entropy"] for stage in runs}
    figure_of(entropy, "entropy, nats").savefig(this.folder / "entropy.png", dpi=130)
    write_results(this.folder, results)


if __name__ == "__main__":
    sys.exit(run_study("aopd", __doc__, study))
