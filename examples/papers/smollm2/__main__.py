"""The objectives of the three papers on a real model: SmolLM2-135M-Instruct teaches itself with 6 of 30 layers removed.

OPD, IW-OPD, the local support of Revisiting OPD and AOPD heal the pruned model on real questions; what is measured is
the held-out reverse KL. Models and prompts are the quickstart's, made where they are missing; run it from the root of
the repository.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from examples.papers.pair import Recipe
from examples.papers.settings import Study, run_study
from examples.papers.study import HELDOUT_KL, by_variant, curve, figure_of, show, train, write_results
from tools import quickstart

VARIANTS: dict[str, dict[str, Any]] = {
    "OPD": {},
    "IW-OPD": {"objective.preset": "iw-opd"},
    "top 32": {"objective.preset": "lsm"},
    "AOPD": {"objective.preset": "aopd"},
}


def study(this: Study) -> None:
    """All of it."""
    smoke = this.size.variants is not None
    base = {
        "precision": "bf16",
        "student.path": str(quickstart.STUDENT_HF),
        "teacher.path": str(quickstart.TEACHER_HF),
        "data.prompts": str(quickstart.PROMPTS / "train.jsonl"),
        "data.max_prompt_tokens": 256,
        "rollout.prompts_per_step": 8,
        "rollout.max_new_tokens": 8 if smoke else 64,
        "objective.preset": "opd",
        "optimizer.lr": 1e-4,
        "optimizer.beta2": 0.98,
        "training.steps": 1 if smoke else 16,
        "training.microbatch_tokens": 2048,
        "evaluation.prompts": str(quickstart.PROMPTS / "heldout.jsonl"),
        "evaluation.max_prompts": 4 if smoke else 32,
        "evaluation.every": 1 if smoke else 8,
        "checkpoint.save_every": 0,
        "checkpoint.asynchronous": False,
        "checkpoint.export_hf": False,
    }
    runs = this.runs("healed", VARIANTS, base)
    train(runs, this.console)
    kl = {name: curve(each, HELDOUT_KL) for name, each in by_variant(runs).items()}
    steps = next(iter(kl.values()))
    rows = [[name, *(each[step].shown(3) for step in steps)] for name, each in kl.items()]
    show("Held-out reverse KL, nats a token, by step", ["", *map(str, steps)], rows, this.console)
    figure_of({"SmolLM2-135M, 24 of 30 layers": kl}, "held-out reverse KL").savefig(
        this.folder / "figure.png", dpi=130
    )
    write_results(this.folder, {HELDOUT_KL: kl})


def quickstart_models(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> dict[str, float]:
    """Makes the quickstart's inputs, in the place of models from scratch."""
    quickstart.prepare(Console())
    return {}


if __name__ == "__main__":
    sys.exit(run_study("smollm2", __doc__, study, models=quickstart_models))
