"""The command line, `megatron-opd`.

Every command imports what it needs when it runs, so that `--help` is quick. Exit codes: 0, 1 (something failed; an
outage of servers, say, is one `error: ...` line on stderr), 2 (a mistake of the user: one such line), 75 (a signal has
stopped a training, which has saved: the same command goes on), 130 (Ctrl-C).
"""

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_opd.cli_convert import convert
from megatron_opd.cli_evaluate import evaluate
from megatron_opd.cli_plan import ConfigFile, Overrides, plan
from megatron_opd.cli_report import report
from megatron_opd.cli_slurm import slurm
from megatron_opd.cli_teacher_cache import teacher_cache
from megatron_opd.errors import UserError
from megatron_opd.launch.worker import (
    EXIT_FILE,
    REQUEUE_EXIT,
    end_forks_with_this_process,
    end_with_launcher,
    leave_exit_code,
    report_user_error,
)

app = typer.Typer(
    help="On-policy distillation of language models on Megatron-Core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
launch = typer.Typer(help="Start a training with all its processes.", no_args_is_help=True)
app.add_typer(launch, name="launch")
app.add_typer(convert, name="convert")
app.command()(plan)
launch.command()(slurm)
app.command()(evaluate)
app.command()(report)
app.command()(teacher_cache)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train in this process, or as one rank of several that something else has started.

    Processes that torchrun or another launcher starts find each other through RANK, WORLD_SIZE, MASTER_ADDR
    and MASTER_PORT. Relative paths in CONFIG are relative to the current directory.
    """
    from megatron_opd.config.layout_checks import processes_of_run
    from megatron_opd.config.load import load_config
    from megatron_opd.preflight import check_before_start

    loaded = load_config(config, overrides or [])
    needed = processes_of_run(loaded)
    if needed > 1 and "RANK" not in os.environ:
        check_before_start(loaded, needed)
        raise UserError(
            f"parallel: this layout needs {needed} processes and this is one: "
            "use `megatron-opd launch local` instead"
        )
    from megatron_opd.train import train as run

    end_forks_with_this_process()
    if not run(loaded):
        raise typer.Exit(REQUEUE_EXIT)


@launch.command()
def local(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes. Default: what `parallel` in CONFIG asks for.", show_default=False
        ),
    ] = None,
) -> None:
    """Train on this machine: start the processes, watch them, end them all when one fails.

    Run the same command again to resume from the last checkpoint in the run directory.
    """
    from megatron_opd.config.layout_checks import processes_of_run
    from megatron_opd.config.load import load_config
    from megatron_opd.launch.local import run_workers
    from megatron_opd.preflight import check_before_start, check_devices

    loaded = load_config(config, overrides or [])
    processes = nproc or processes_of_run(loaded)
    check_before_start(loaded, processes)
    check_devices(processes)
    outcome = run_workers(
        ["-m", "megatron_opd.cli", "train", "--", str(config), *(overrides or [])],
        processes,
        if_killed="start the same command again to resume",
    )
    if outcome.message:
        print(f"error: {outcome.message}", file=sys.stderr)
    raise typer.Exit(outcome.exit_code)


@app.command()
def serve(
    role: Annotated[Literal["rollout", "teacher"], typer.Argument(help="The section with the servers.")],
    config: ConfigFile,
    overrides: Overrides = None,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Of the first server; the others follow.")
    ] = 30000,
) -> None:
    """Start the SGLang servers of a run on this machine and keep them going, until SIGTERM or Ctrl-C.

    The run itself, elsewhere, has them as ROLE.sglang.urls. Both find the servers' key in SGLANG_API_KEY.
    """
    from megatron_opd.config.load import load_config
    from megatron_opd.serve import serve as keep

    os.environ.pop(EXIT_FILE, None)  # of the job that this is a part of: its ranks tell how it ends
    keep(load_config(config, overrides or []), role, port)


@app.command()
def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="YAML file of a run to look for.", show_default=False),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check what this machine has, and whether it can train. Exit code 1 when it cannot.

    With CONFIG also whether that run could start: layout, disk of run_dir, ports, servers. Started as ranks, by srun
    say, it checks all their machines, what they share and the connections between them; rank 0 prints.
    """
    from megatron_opd.config.load import load_config
    from megatron_opd.launch.doctor import examine

    raise typer.Exit(examine(load_config(config, overrides or []) if config is not None else None))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line `arguments` (default: those of this process) and exits."""
    end_with_launcher()
    for category in (FutureWarning, UserWarning):  # theirs to mend, and said by every process
        warnings.filterwarnings("ignore", category=category, module=r"(megatron|torch)\.")
    given = list(arguments) if arguments is not None else None
    try:
        code = app(args=given, prog_name="megatron-opd", standalone_mode=False) or 0
    except typer.TyperException as error:
        if error.format_message():  # else there were no arguments at all, and the help is printed
            report_user_error(_usage_error(error))
        sys.exit(2)
    except UserError as error:
        report_user_error(error)
        sys.exit(error.exit_code)
    if code == 130 and "RANK" not in os.environ:  # Ctrl-C, as typer tells it
        print(
            "interrupted: start the same command again; a training goes on from its last checkpoint",
            file=sys.stderr,
        )
    if code == REQUEUE_EXIT:
        leave_exit_code(code)
    sys.exit(code)


def _usage_error(error: typer.TyperException) -> UserError:
    """What typer says of a command line that it does not understand, in one line of our style."""
    message = " ".join(error.format_message().split()).removesuffix(".").replace("Value error, ", "")
    near = getattr(error, "possibilities", None)
    if near:
        message = f"no such option: {error.option_name}; did you mean {near[0]}?"  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "megatron-opd"
    return UserError(f"{message[0].lower()}{message[1:]} (see {command} --help)")


if __name__ == "__main__":
    main()
