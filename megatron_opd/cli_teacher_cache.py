"""`megatron-opd teacher-cache`: what the folder of `teacher.cache` holds."""

from pathlib import Path
from typing import Annotated

import typer


def teacher_cache(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="Folder of teacher.cache, or one file of it.", show_default=False
        ),
    ],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Model folder: tokens are shown as text instead of ids.", show_default=False),
    ] = None,
) -> None:
    """Say how much each teacher has said; of one file, what it said of every token."""
    from megatron_opd.teacher.cache_report import describe

    if tokenizer is None:
        print(describe(path, lambda token: f"{token} "))
        return
    from megatron_opd.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    print(describe(path, lambda token: str(loaded.decode([token]))))
