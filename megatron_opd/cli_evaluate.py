"""`megatron-opd evaluate`: a model on a run's tasks."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_opd.cli_plan import ConfigFile, Overrides

if TYPE_CHECKING:
    from megatron_opd.config.schema import Config

ModelFolder = Annotated[
    Path | None,
    typer.Option(
        "--model",
        help="Folder of the model, of any kind. Default: the run's newest checkpoint.",
        show_default=False,
    ),
]
OutputFolder = Annotated[
    Path | None,
    typer.Option(
        "--output",
        help="Folder for samples and results.json. Default: RUN_DIR/evaluate/MODEL.",
        show_default=False,
    ),
]
PrintJson = Annotated[bool, typer.Option("--json", help="Print results.json instead of a table.")]


def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    model: ModelFolder = None,
    output: OutputFolder = None,
    json: PrintJson = False,
) -> None:
    """Evaluate a model on the tasks in `evaluation.tasks`: avg@k, pass@k and maj@k with their intervals.

    The processes of the layout `parallel` are started on this machine, unless something else has started them.
    """
    from megatron_opd.config.layout_checks import processes_needed
    from megatron_opd.config.load import load_config

    loaded = load_config(config, overrides or [])
    processes = processes_needed(loaded.parallel)
    if processes > 1 and "RANK" not in os.environ:
        words = [str(config), *(overrides or [])]
        raise typer.Exit(_start(loaded, processes, words, model, output, json=json))
    from megatron_opd.evaluation.standalone import (
        RESULTS,
        default_output,
        evaluate_model,
        model_of,
        print_scores,
    )

    folder = model_of(loaded, model)
    target = output or default_output(loaded, folder)
    scores = evaluate_model(loaded, folder, target, quiet=json)
    if scores and json:
        print((target / RESULTS).read_text(), end="")
    elif scores:
        print_scores(scores)
        print(f"samples and {RESULTS}: {target}")


def _start(
    config: "Config", processes: int, words: list[str], model: Path | None, output: Path | None, *, json: bool
) -> int:
    """The same command in so many processes; returns the exit code."""
    from megatron_opd.evaluation.standalone import check_evaluation, model_of
    from megatron_opd.launch.local import run_workers
    from megatron_opd.preflight import check_devices

    check_evaluation(config, model_of(config, model), processes)
    check_devices(processes)
    options = ["--json"] if json else []
    for option, folder in (("--model", model), ("--output", output)):
        options += [option, str(folder)] if folder is not None else []
    outcome = run_workers(["-m", "megatron_opd.cli", "evaluate", *options, "--", *words], processes)
    if outcome.message:
        print(f"error: {outcome.message}", file=sys.stderr)
    return outcome.exit_code
