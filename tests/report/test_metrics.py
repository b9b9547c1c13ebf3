"""metrics.jsonl and TensorBoard: every step once, whatever was interrupted and resumed."""

import json
import math
import os

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_opd.report.metrics import MetricsWriter, read_metrics


def run(run_dir, steps, *, resume_step=None, offset=0.0):
    writer = MetricsWriter(run_dir, resume_step)
    for step in steps:
        writer.log(step, {"loss": step + offset, "eval/reverse_kl": step / 2 + offset})
    writer.close()


def board(run_dir, tag):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_one_object_a_step_in_both_outputs(tmp_path):
    run(tmp_path, range(3))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": s, "loss": float(s), "eval/reverse_kl": s / 2} for s in range(3)
    ]
    assert read_metrics(tmp_path) == [json.loads(line) for line in lines]
    assert board(tmp_path, "train/loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert board(tmp_path, "eval/reverse_kl") == [(0, 0.0), (1, 0.5), (2, 1.0)]


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.log(1, {"loss": 0.5})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}]
    writer.close()


def test_numbers_are_written_without_loss(tmp_path):
    values = {"a": 0.1 + 0.2, "b": 1e-300, "tokens": 2**40}
    writer = MetricsWriter(tmp_path)
    writer.log(1, values)
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 1, **values}]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_null_and_the_file_stays_json(tmp_path, value):
    writer = MetricsWriter(tmp_path)
    writer.log(1, {"grad_norm": value})
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 1, "grad_norm": None}]


def test_resuming_cuts_back_to_the_checkpoint_and_keeps_the_tail_aside(tmp_path):
    run(tmp_path, range(6))
    run(tmp_path, range(3, 5), resume_step=2, offset=0.25)
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [
        (0, 0.0), (1, 1.0), (2, 2.0), (3, 3.25), (4, 4.25),
    ]  # fmt: skip
    discarded = (tmp_path / "metrics.discarded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in discarded] == [3, 4, 5]
    assert board(tmp_path, "train/loss") == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.25), (4, 4.25)]


def test_a_second_resume_appends_to_what_was_set_aside(tmp_path):
    run(tmp_path, range(4))
    run(tmp_path, range(2, 4), resume_step=1, offset=0.25)
    run(tmp_path, [3], resume_step=2, offset=0.5)
    discarded = (tmp_path / "metrics.discarded.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in discarded] == [2.0, 3.0, 3.25]
    assert [row["loss"] for row in read_metrics(tmp_path)] == [0.0, 1.0, 2.25, 3.5]


def test_a_run_that_starts_anew_keeps_none_of_the_old_rows(tmp_path):
    run(tmp_path, range(3))
    run(tmp_path, [0], offset=0.25)
    assert [row["loss"] for row in read_metrics(tmp_path)] == [0.25]
    assert board(tmp_path, "train/loss") == [(0, 0.25)]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    run(tmp_path, range(3))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]
    run(tmp_path, [2], resume_step=1)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]
    assert not (tmp_path / "metrics.discarded.jsonl").exists()


def test_tensorboard_cut_short_by_a_kill_goes_on(tmp_path):
    run(tmp_path, range(4))
    (events,) = (tmp_path / "tensorboard").iterdir()
    os.truncate(events, events.stat().st_size - 9)  # in the middle of a record
    run(tmp_path, range(2, 5), resume_step=1, offset=0.25)
    assert board(tmp_path, "train/loss") == [(0, 0.0), (1, 1.0), (2, 2.25), (3, 3.25), (4, 4.25)]
    assert events.exists(), "the old tail is kept"


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == []


def test_the_last_line_can_be_completed(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.log(1, {"loss": 2.0})
    writer.log(2, {"loss": 1.0})
    writer.complete(2, {"eval/reverse_kl": 0.5})
    writer.log(3, {"loss": 0.5})
    writer.close()
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0, "eval/reverse_kl": 0.5},
        {"step": 3, "loss": 0.5},
    ]
