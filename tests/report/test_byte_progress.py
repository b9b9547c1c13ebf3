"""Progress of moving bytes: a bar on a terminal, few plain lines in a log file."""

import io

from rich.console import Console

from megatron_opd.report.byte_progress import ByteProgress


def run(seconds_each: float, terminal: bool = False) -> str:
    """What is shown of 2 GB in ten steps that take so long each."""
    now, out = [100.0], io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with ByteProgress("convert", console, lambda: now[0]) as progress:
        for step in range(1, 11):
            now[0] += seconds_each
            progress(step * 200_000_000, 2_000_000_000)
    return out.getvalue()


def test_a_quick_conversion_is_one_line():
    assert run(0.1) == "convert  2.0 GB of 2.0 GB  2.0 GB/s\n"


def test_plain_lines_come_at_most_every_ten_seconds():
    lines = run(4.0).splitlines()
    done = [line.split("  ")[1].removesuffix(" of 2.0 GB") for line in lines]
    assert done == ["600.0 MB", "1.2 GB", "1.8 GB", "2.0 GB"]


def test_a_terminal_shows_a_bar():
    shown = run(1.0, terminal=True)
    assert "convert" in shown and "2.0/2.0 GB" in shown and "━" in shown
