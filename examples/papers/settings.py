"""What the studies share: sizes, models, the configuration that variants change, and how a study begins."""

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from examples.papers.pair import Learner, Recipe, make_models
from examples.papers.study import Changes, Run, runs_of
from examples.papers.tasks import chain_sums, sortings
from megatron_opd.errors import UserError

TERMS, NUMBERS = 6, 5
TASKS = {"chain": partial(chain_sums, terms=TERMS), "sort": partial(sortings, numbers=NUMBERS)}


def recipe(teacher_steps: int, student_steps: int, *, good: float = 1.0, **counts: int) -> Recipe:
    """The models: a teacher, students of its size and start, a smaller one, one with another spelling.

    `good` scales the shares at which students are stopped.
    """
    large = partial(Learner, hidden=96, layers=3)
    return Recipe(
        learners=(
            large(steps=teacher_steps, stages={"teacher": None}, seed=1),
            large(
                steps=student_steps,
                stages={"weak": good * 0.1, "student": good * 0.3, "strong": good * 0.5},
                seed=2,
            ),
            Learner(hidden=64, layers=2, steps=student_steps, stages={"small": good * 0.3}, seed=3),
            large(steps=student_steps, stages={"spelt_out": good * 0.3}, spelt_out=True, seed=4),
        ),
        tasks=dict(TASKS),
        max_new_tokens=64,
        **counts,
    )


MakeModels = Callable[[Recipe, Path, Callable[[str], None]], dict[str, float]]


@dataclass(frozen=True)
class Size:
    """How large a study is."""

    recipe: Recipe
    seeds: tuple[int, ...]
    steps: int
    rollouts: int  # a step
    every: int  # steps between evaluations
    problems: int  # of an evaluation
    variants: int | None = None  # of every comparison, the first ones; None: all


FULL = Size(recipe(1500, 1500), seeds=(1, 2, 3), steps=60, rollouts=64, every=20, problems=256)
SMOKE = Size(
    recipe(4, 2, good=0.0, supervised=64, prompts=16, held_out=8),
    seeds=(1,),
    steps=1,
    rollouts=4,
    every=1,
    problems=4,
    variants=2,
)


@dataclass(frozen=True)
class Study:
    """A study that has begun: its size, where its runs and the models lie, and what each model solves."""

    size: Size
    folder: Path
    models: Path
    solved: dict[str, float]
    console: Console

    def runs(self, name: str, variants: Mapping[str, Changes], base: Changes) -> list[Run]:
        """The runs of a comparison, in a folder of that name."""
        few = dict(list(variants.items())[: self.size.variants])
        return runs_of(self.folder / name, few, self.size.seeds, base)

    def base(self, student: str, *, task: str = "chain") -> dict[str, Any]:
        """The configuration of a run of `student` on the prompts of `task`, by dotted keys. Sums are always tested."""
        size = self.size
        tests = {
            name: {
                "path": str(self.models / f"{name}.held_out.jsonl"),
                "max_problems": size.problems,
                "top_p": 1.0,
            }
            for name in dict.fromkeys(("chain", task))
        }
        return {
            "precision": "fp32",
            "student.path": str(self.models / student),
            "teacher.path": str(self.models / "teacher"),
            "data.prompts": str(self.models / f"{task}.prompts.jsonl"),
            "data.max_prompt_tokens": 64,
            "rollout.prompts_per_step": size.rollouts,
            "rollout.max_new_tokens": size.recipe.max_new_tokens,
            "objective.preset": "opd",
            "optimizer.lr": 1e-4,
            "optimizer.warmup_steps": min(5, size.steps),
            "optimizer.beta2": 0.98,
            "training.steps": size.steps,
            "training.microbatch_tokens": 16384,
            "evaluation.prompts": str(self.models / f"{task}.held_out.jsonl"),
            "evaluation.max_prompts": size.problems,
            "evaluation.tasks": tests,
            "evaluation.every": size.every,
            "checkpoint.save_every": 0,
            "checkpoint.asynchronous": False,
            "checkpoint.export_hf": False,
        }


def run_study(
    name: str, description: str | None, study: Callable[[Study], None], *, models: MakeModels = make_models
) -> int:
    """The command of a study: its options, the models, the study. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.papers.{name}",
        description=description,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps of tiny runs: does everything work?"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/papers"),
        help="for models, runs and results (default: %(default)s)",
    )
    parser.add_argument("--afresh", action="store_true", help="do runs again that are finished")
    given = parser.parse_args()
    size = SMOKE if given.smoke else FULL
    root = given.folder / "smoke" if given.smoke else given.folder
    console = Console(highlight=False, soft_wrap=True)
    try:
        if given.afresh:
            shutil.rmtree(root / name, ignore_errors=True)
        folder = root / size.recipe.folder
        solved = models(size.recipe, folder, console.print)
        study(Study(size, root / name, folder, solved, console))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from where it was", file=sys.stderr)
        return 130
    console.print(f"results, figures and runs: {root / name}")
    return 0
