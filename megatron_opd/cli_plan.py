"""`megatron-opd plan`: memory, traffic and time of a run, without running it."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Values that win over the file's, such as parallel.tensor=4."),
]
Processes = Annotated[
    int | None,
    typer.Option(min=1, help="Processes. Default: what the layouts in CONFIG ask for.", show_default=False),
]
HardwareName = Annotated[
    str, typer.Option("--hardware", help="Name of a device that comes with the package, or a YAML file.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    processes: Processes = None,
    hardware: HardwareName = "h100-80gb",
    json: AsJson = False,
) -> None:
    """Predict memory, traffic and time of a run, and what to change. Exit code 1 when it does not fit.

    Of the models only config.json is read; prompts and run directory need not exist. A run that would be refused at
    its start is refused here with the same line.
    """
    from megatron_opd.config.layout_checks import processes_of_run
    from megatron_opd.config.load import load_config
    from megatron_opd.plan.advice import advise
    from megatron_opd.plan.hardware import load_hardware
    from megatron_opd.plan.plan import Plan
    from megatron_opd.plan.table import as_json, print_plan

    device = load_hardware(hardware)
    loaded = load_config(config, overrides or [])
    planned = Plan.of(loaded, processes or processes_of_run(loaded), device)
    advice = advise(planned)
    if json:
        from json import dumps

        print(dumps(as_json(planned, advice), indent=2))
    else:
        print_plan(planned, advice)
    raise typer.Exit(0 if planned.fits else 1)
