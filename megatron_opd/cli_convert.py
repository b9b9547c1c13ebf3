"""`megatron-opd convert`: model folders from one kind to the other, checked and looked into."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

convert = typer.Typer(help="Convert, compare and inspect model folders.", no_args_is_help=True)

Source = Annotated[Path, typer.Argument(metavar="SRC", help="Folder to read.", show_default=False)]
Dtype = Annotated[Literal["keep", "bf16", "fp32"], typer.Option(help="What the weights are written in.")]
Processes = Annotated[int, typer.Option(min=1, help="Processes that share the work.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check SRC and DST, print what would be written, write nothing."),
]
Target = Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.", show_default=False)]
First = Annotated[Path, typer.Argument(metavar="A", help="Model folder.", show_default=False)]
Second = Annotated[
    Path, typer.Argument(metavar="B", help="Model folder to compare with A.", show_default=False)
]


@convert.command("hf-to-megatron")
def convert_hf_to_megatron(
    source: Source, target: Target, dtype: Dtype = "keep", processes: Processes = 1, dry_run: DryRun = False
) -> None:
    """Write the Hugging Face folder SRC as a Megatron folder DST."""
    _convert("hf-to-megatron", source, target, dtype, processes, dry_run)


@convert.command("megatron-to-hf")
def convert_megatron_to_hf(
    source: Source, target: Target, dtype: Dtype = "keep", processes: Processes = 1, dry_run: DryRun = False
) -> None:
    """Write the Megatron folder SRC, or a checkpoint of a run, as a Hugging Face folder DST."""
    _convert("megatron-to-hf", source, target, dtype, processes, dry_run)


def _convert(
    direction: Literal["hf-to-megatron", "megatron-to-hf"],
    source: Path,
    target: Path,
    dtype: Literal["keep", "bf16", "fp32"],
    processes: int,
    dry_run: bool,
) -> None:
    from megatron_opd.checkpoint import convert

    several = processes > 1 and "RANK" not in os.environ
    if dry_run or several:  # what is wrong shows before any process is started
        make_plan = (
            convert.plan_hf_to_megatron if direction == "hf-to-megatron" else convert.plan_megatron_to_hf
        )
        plan = make_plan(source, dtype)
        convert.check_target(plan, target)
        if dry_run:
            print(plan.describe())
            return
    if several:
        _run_processes(
            ["convert", direction, "--dtype", dtype, "--", str(source), str(target)], processes, target
        )

    from megatron_opd.report.byte_progress import ByteProgress

    run = convert.hf_to_megatron if direction == "hf-to-megatron" else convert.megatron_to_hf
    with convert.launched_group() as group:
        if group is None:
            with ByteProgress(direction) as progress:
                run(source, target, dtype=dtype, progress=progress)
        elif group.rank() == 0:
            with ByteProgress(f"{direction}, {group.size()} processes") as progress:
                run(source, target, dtype=dtype, group=group, progress=progress)
        else:
            run(source, target, dtype=dtype, group=group)


def _run_processes(command: list[str], processes: int, target: Path) -> NoReturn:
    from megatron_opd.checkpoint.folders import tidied
    from megatron_opd.launch.local import run_workers

    with tidied(target):
        outcome = run_workers(
            ["-m", "megatron_opd.cli", *command],
            processes,
            if_killed="nothing was written; start again, with fewer --processes if memory was short",
        )
    if outcome.message:
        print(f"error: {outcome.message}", file=sys.stderr)
    raise typer.Exit(outcome.exit_code)


@convert.command("gguf-to-hf")
def convert_gguf_to_hf(
    source: Annotated[Path, typer.Argument(metavar="FILE.gguf", show_default=False)],
    target: Target,
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="What the weights are written in.")] = "bf16",
) -> None:
    """Write the model of a GGUF file, dequantised, as a Hugging Face folder DST."""
    from megatron_opd.checkpoint.gguf_import import gguf_to_hf

    print(gguf_to_hf(source, target, dtype=dtype))


@convert.command()
def verify(
    first: First,
    second: Second,
    text: Annotated[
        Path | None,
        typer.Option(help="Text to compare on. Default: built-in conversations.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to compare on, at most.")] = 256,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="What the logits are computed in.")] = "fp32",
    atol: Annotated[
        float | None,
        typer.Option(min=0, help="Tolerated difference of logits. Default: by dtype.", show_default=False),
    ] = None,
    kl: Annotated[
        float | None,
        typer.Option(min=0, help="Tolerated mean KL, in nats. Default: by dtype.", show_default=False),
    ] = None,
    tensors: Annotated[
        bool,
        typer.Option("--tensors", help="Compare the stored numbers instead, bit for bit; builds no model."),
    ] = False,
) -> None:
    """Compare the logits of two model folders, Hugging Face or Megatron, on the same text.

    Transformers runs a Hugging Face folder, megatron-core a Megatron folder. Exit code 1 when they differ by more than
    the tolerance: by default 1e-4 and a KL of 1e-6, more where bf16 rounds (the report says what was applied).
    """
    if tensors:
        _verify_tensors(first, second)
        return
    from megatron_opd.checkpoint.verify import verify_logits

    outcome = verify_logits(
        first, second, text=text, tokens=tokens, precision=dtype, logits_tolerance=atol, kl_tolerance=kl
    )
    print(outcome.describe())
    if not outcome.passed:
        _fail(f"{first} and {second} differ by more than the tolerance")
    print("the same, within the tolerance")


def _verify_tensors(first: Path, second: Path) -> None:
    from megatron_opd.checkpoint.verify_tensors import verify_tensors
    from megatron_opd.report.byte_progress import ByteProgress

    with ByteProgress("verify") as progress:
        outcome = verify_tensors(first, second, progress)
    compared = f"{outcome.tensors} tensors, {outcome.nbytes:,} bytes"
    for difference in outcome.differences[:10]:
        print(difference)
    if not outcome.passed:
        _fail(f"{first} and {second} differ in {len(outcome.differences)} of {compared}")
    print(f"identical, bit for bit: {compared}")


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(1)


@convert.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", show_default=False)],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Compare a Megatron folder's files with their checksums, which reads them all."
        ),
    ] = False,
) -> None:
    """Say what a model folder, Hugging Face or Megatron, holds.

    Reads headers; of the numbers only a stored LM head that is tied to the embedding, and what --check asks for.
    """
    from megatron_opd.checkpoint.inspection import describe_folder
    from megatron_opd.report.byte_progress import ByteProgress

    if not check:
        print(describe_folder(folder, tensors=tensors))
        return
    with ByteProgress("checksums") as progress:
        report = describe_folder(folder, tensors=tensors, check=True, progress=progress)
    print(report)
