"""Weights of tokens by what came before them: IW-OPD and what it was compared with (2606.22600, tables 1 and 4).

OPD, IW-OPD, the same weights divided by their mean over the response, more weight for a fixed prefix, a prefix that
grows, sums of the log-gap with its sign, and the raw ratio of the prefix at several exponents; with a student of the
teacher's size and with a smaller one.
"""

import sys
from typing import Any

from examples.papers.settings import Study, run_study
from examples.papers.study import SOLVED, Mean, compared, figure_of, train, write_results

WEIGHT = "objective.token_weight"
IW_OPD = {"objective.preset": "iw-opd"}
VARIANTS: dict[str, dict[str, Any]] = {
    "OPD": {},
    "IW-OPD": IW_OPD,
    "IW-OPD, mean 1": {**IW_OPD, f"{WEIGHT}.unit_mean": True},
    "IW-OPD, signed": {**IW_OPD, f"{WEIGHT}.signed": True},
    "prefix of 30 %": {f"{WEIGHT}.kind": "prefix_window", f"{WEIGHT}.gamma": 0.5},
    "curriculum": {f"{WEIGHT}.kind": "curriculum", f"{WEIGHT}.gamma": 0.5},
    **{
        f"ratio, alpha {alpha}": {
            f"{WEIGHT}.kind": "prefix_ratio",
            f"{WEIGHT}.alpha": alpha,
            f"{WEIGHT}.gamma": 1.0,
            f"{WEIGHT}.floor": 0.0,
        }
        for alpha in (1.0, 0.1, 0.01)
    },
}
PAIRS = {"same size": "student", "smaller student": "small"}


def study(this: Study) -> None:
    """All of it."""
    results: dict[str, Any] = {"models": this.solved}
    panels: dict[str, dict[str, dict[int, Mean]]] = {}
    runs = {pair: this.runs(student, VARIANTS, this.base(student)) for pair, student in PAIRS.items()}
    train([run for each in runs.values() for run in each], this.console)
    for pair, each in runs.items():
        results[pair] = compared(pair, each, this.size.every, this.console)
        panels[pair] = results[pair][SOLVED]
    figure_of(panels, "problems solved").savefig(this.folder / "figure.png", dpi=130)
    write_results(this.folder, results)


if __name__ == "__main__":
    sys.exit(run_study("iw_opd", __doc__, study))
