"""Progress: a bar on a terminal, few plain lines in a log file."""

import io

import pytest
from rich.console import Console

from megatron_opd.report.progress import TrainingProgress, format_duration


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(step_seconds, *, total=None, first_step=0, terminal=False):
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with TrainingProgress(total or len(step_seconds), first_step, console, clock) as progress:
        for step, seconds in enumerate(step_seconds, start=first_step + 1):
            clock.now += seconds
            progress.update(step, {"loss": 1.5, "reverse_kl": 1.25, "tokens": 512})
    return out.getvalue()


def test_a_plain_line_says_everything():
    (line,) = run([4.0], total=11).splitlines()
    assert line == "step 1/11  loss 1.5000  reverse_kl 1.2500  128 tokens/s  4.00 s/step  ETA 0:40"


def test_plain_lines_come_first_last_and_at_most_every_ten_seconds():
    lines = run([3.0] * 12).splitlines()
    assert [line.split()[1] for line in lines] == ["1/12", "5/12", "9/12", "12/12"]


def test_slow_steps_get_a_line_each():
    assert len(run([11.0] * 4).splitlines()) == 4


def test_the_remaining_time_follows_recent_steps_and_ignores_an_outlier():
    lines = run([60.0] + [12.0] * 9, total=20).splitlines()
    assert lines[-1].endswith("12.00 s/step  ETA 2:00")


def test_a_resumed_run_counts_on():
    (line,) = run([5.0], total=40, first_step=20).splitlines()
    assert line.startswith("step 21/40") and line.endswith("ETA 1:35")


def test_time_between_steps_counts_for_the_remaining_time_alone():
    clock, out = Clock(), io.StringIO()
    row = {"tokens": 512, "rollout_seconds": 1.5, "train_seconds": 0.5, "eval/seconds": 40.0}
    with TrainingProgress(13, 0, Console(file=out, width=120), clock) as progress:
        clock.now += 50 + 2  # an evaluation before the first step
        progress.update(1, row)
        for step in (2, 3):
            clock.now += 2 + 9  # a checkpoint after every step
            progress.update(step, row)
    lines = [line.split("  ", 1) for line in out.getvalue().splitlines()]
    assert lines == [
        ["step 1/13", "256 tokens/s  2.00 s/step  ETA 0:24"],
        ["step 2/13", "256 tokens/s  2.00 s/step  ETA 1:12"],  # the median of 2 and 11 seconds
        ["step 3/13", "256 tokens/s  2.00 s/step  ETA 1:50"],
    ]


def test_a_skipped_step_without_numbers_is_shown_too():
    clock, out = Clock(), io.StringIO()
    with TrainingProgress(2, 0, Console(file=out, width=120), clock) as progress:
        progress.update(1, {"skipped": 1})
    assert out.getvalue().startswith("step 1/2")


def test_a_terminal_gets_a_bar_with_live_numbers():
    shown = run([4.0, 4.0], total=4, terminal=True)
    assert "2/4" in shown and "reverse_kl 1.2500" in shown and "ETA 0:08" in shown


def test_brackets_in_a_line_are_text():
    out = io.StringIO()
    TrainingProgress(1, 0, Console(file=out, width=120)).say("[red]x[/red]")
    assert out.getvalue() == "[red]x[/red]\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (725, "12:05"), (11045, "3:04:05")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
