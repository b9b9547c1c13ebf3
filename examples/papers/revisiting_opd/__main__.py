"""Sampled tokens, local supports and special tokens: Revisiting OPD (2603.25562, tables 1 and 3, figure 6).

The policy gradient of the sampled tokens beside the reverse KL over the teacher's best ids, with and without
renormalisation, at two cuts of the rollouts. And a student that spells `<answer>` in three tokens, which the teacher
has never seen: with and without a mask for them. The third part of the paper, the discount of later rewards, is
`python -m examples.papers.revisiting_opd.discount`.
"""

import sys
from typing import Any

from examples.papers.settings import Study, run_study
from examples.papers.study import SOLVED, compared, figure_of, train, write_results
from examples.papers.tasks import SPELT_OUT

LSM = {"objective.preset": "lsm", "objective.k": 8}
BARE = {**LSM, "objective.remainder": "none"}
MASK = {"objective.mask.tokens": list(SPELT_OUT)}
SUPPORTS: dict[str, dict[str, Any]] = {
    f"{name}, top-p {cut}": {**changes, "rollout.top_p": cut}
    for name, changes in (("sampled token", {}), ("top 8", LSM), ("top 8, as it is", BARE))
    for cut in (1.0, 0.9)
}
SPELLINGS: dict[str, dict[str, Any]] = {
    "sampled token": {},
    "sampled token, mask": MASK,
    "top 8": {**LSM, "rollout.top_p": 0.9},
    "top 8, mask": {**LSM, **MASK, "rollout.top_p": 0.9},
}


def study(this: Study) -> None:
    """All of it."""
    runs = {
        "supports": this.runs("supports", SUPPORTS, this.base("student")),
        "another spelling": this.runs("spelling", SPELLINGS, this.base("spelt_out")),
    }
    train([run for each in runs.values() for run in each], this.console)
    results: dict[str, Any] = {"models": this.solved}
    shown = {"gradient norm": "grad_norm", "tokens": "response_tokens"}
    for part, each in runs.items():
        results[part] = compared(part, each, this.size.every, this.console, shown)
    panels = {part: results[part][SOLVED] for part in runs}
    figure_of(panels, "problems solved").savefig(this.folder / "figure.png", dpi=130)
    write_results(this.folder, results)


if __name__ == "__main__":
    sys.exit(run_study("revisiting_opd", __doc__, study))
