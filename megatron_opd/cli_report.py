"""`megatron-opd report`: one page, and pictures, of what runs did."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_opd.errors import UserError, why_refused

RunFolders = Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories.", show_default=False)]
Out = Annotated[
    Path | None,
    typer.Option(
        help="The page to write. Default: report.html, of one run in its directory.", show_default=False
    ),
]


def report(runs: RunFolders, out: Out = None) -> None:
    """Write a page with the curves, figures, samples and settings of runs, several overlaid.

    It is one HTML file that needs no network. The figures are written as PNG too, into the folder of the page's name
    without .html.
    """
    from megatron_opd.report.page import REPORT_FILE, write_pictures, write_report

    page = out or (runs[0] / REPORT_FILE if len(runs) == 1 else Path(REPORT_FILE))
    if page.suffix != ".html":
        raise UserError(f"--out {page}: the page is an HTML file, name it {page.name}.html")
    try:
        write_pictures(write_report(runs, page), page.with_suffix(""))
    except OSError as error:
        raise UserError(f"cannot write {page}: {why_refused(error) or error.strerror}") from error
    print(f"{page}  (figures: {page.with_suffix('')})")
