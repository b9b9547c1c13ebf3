"""The run log on a disk that is full or cannot be written: one line that says so, no traceback."""

import errno
import json
import os
import re
from pathlib import Path

import pytest

from megatron_opd.data.rollouts import Rollout, read_rollouts
from megatron_opd.errors import UserError
from megatron_opd.report.positions import POSITIONS_FILE, Diagnostics
from megatron_opd.report.run_log import RunLog, task_lines
from megatron_opd.report.step_lines import read_steps

ROW = {"loss": 1.0, "reverse_kl": 0.5}
ROLLOUT = Rollout("0@0", 0, [1], [2], [-0.5], "length", 0)
FULL = Path("/dev/full")  # every write to it finds no space


def open_log(run_dir: Path, *, enabled: bool = True) -> RunLog:
    return RunLog(run_dir, start=0, steps=2, enabled=enabled, decode=str)


def refused(run_dir: Path, reason: str) -> str:
    return re.escape(
        f"cannot write to {run_dir}: {reason}; mend that and start the same command again to resume"
    )


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill(path: Path) -> None:
    """Let the disk be full for this file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(FULL)


def test_a_sound_disk_takes_everything(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.record(1, ROW, [ROLLOUT])
        log.summarise(checkpoint=tmp_path / "latest", export=None)
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert {"metrics.jsonl", "rollouts/step_00000001.jsonl", "rollouts/ledger.jsonl", "curve.png"} <= written


def test_a_step_leaves_what_is_known_of_its_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = Diagnostics({"relative": {"tokens": [1]}, "absolute": {"tokens": [1]}}, [{"weight": [0.5]}])
    with open_log(tmp_path) as log:
        log.record(1, ROW, [ROLLOUT, ROLLOUT], seen)
        log.record(2, ROW, [ROLLOUT])
        log.summarise(checkpoint=tmp_path / "latest", export=None)
    assert read_steps(tmp_path / POSITIONS_FILE) == [{"step": 1, **(seen.positions or {})}]
    samples = (tmp_path / "rollouts" / "step_00000001.jsonl").read_text().splitlines()
    assert [json.loads(line).get("trace") for line in samples] == [{"weight": [0.5]}, None]
    assert read_rollouts(tmp_path / "rollouts" / "step_00000001.jsonl") == [ROLLOUT, ROLLOUT]
    said = capsys.readouterr().out  # this run has no settings
    assert f"no report: {tmp_path}: not the directory of a training" in said and "curve.png" in said
    with RunLog(tmp_path, start=1, steps=3, enabled=True, decode=str) as log:
        log.record(2, ROW, [ROLLOUT], seen)
    with RunLog(tmp_path, start=1, steps=3, enabled=True, decode=str):
        assert [row["step"] for row in read_steps(tmp_path / POSITIONS_FILE)] == [1]


def test_what_a_served_teacher_lets_one_know_is_told_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_log(tmp_path) as log:
        log.record(0, {"eval/reverse_kl_sampled": 0.75})
        log.record(1, {"loss": 1.0, "topk_divergence": 0.5, "eval/reverse_kl_sampled": 0.25}, [ROLLOUT])
        log.summarise(checkpoint=tmp_path / "latest", export=None)
    said = capsys.readouterr().out
    assert "held-out reverse KL, estimated from sampled tokens: 0.750 before, 0.250 after" in said
    assert (tmp_path / "curve.png").is_file() and "no step had a token" not in said


def test_a_full_disk_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    monkeypatch.setattr("megatron_opd.report.step_lines.os.fsync", no_space)
    with pytest.raises(UserError, match=refused(tmp_path, "no space left on device")):
        open_log(tmp_path)


def test_a_run_directory_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=refused(tmp_path / "file" / "run", "a parent of it is a file")):
        open_log(tmp_path / "file" / "run")


def test_a_disk_that_fills_up_under_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_opd.report.step_lines._cut_back", lambda *_: None)
    fill(tmp_path / "metrics.jsonl")
    with (
        pytest.raises(UserError, match=refused(tmp_path, "no space left on device")),
        open_log(tmp_path) as log,
    ):
        log.record(1, ROW, [ROLLOUT])  # leaving closes the file, which finds the disk full once more


def test_a_disk_that_fills_up_under_the_samples(tmp_path: Path) -> None:
    fill(tmp_path / "rollouts" / "step_00000001.jsonl.tmp")
    with (
        pytest.raises(UserError, match=refused(tmp_path, "no space left on device")),
        open_log(tmp_path) as log,
    ):
        log.record(1, ROW, [ROLLOUT])


def test_a_disk_that_fills_up_under_the_curve(tmp_path: Path) -> None:
    fill(tmp_path / "curve.png.tmp")
    with open_log(tmp_path) as log:
        log.record(1, ROW, [ROLLOUT])
        with pytest.raises(UserError, match=refused(tmp_path, "no space left on device")):
            log.summarise(checkpoint=tmp_path / "latest", export=None)


@pytest.mark.parametrize("error", [KeyError("a"), OSError(errno.EIO, "Input/output\nerror"), MemoryError()])
def test_whatever_keeps_the_report_from_being_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("megatron_opd.report.run_log.write_report", broken)
    with open_log(tmp_path) as log:
        log.record(1, ROW, [ROLLOUT])
        log.summarise(checkpoint=tmp_path / "latest", export=None)
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if f"no report: {type(error).__name__}: " in line)
    assert "─" in lines[at + 1] and "latest" in "".join(lines[at + 2 :])


def test_a_disk_that_is_full_when_the_files_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_opd.report.run_log.MetricsWriter.close", no_space)
    with pytest.raises(UserError, match=refused(tmp_path, "no space left on device")), open_log(tmp_path):
        pass
    with pytest.raises(ZeroDivisionError), open_log(tmp_path):  # an earlier error stays the one that is told
        _ = 1 / 0


def test_another_error_of_the_system_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_log(tmp_path) as log:
        monkeypatch.setattr("megatron_opd.report.step_lines.os.fsync", broken)
        with pytest.raises(OSError, match="Input/output error"):
            log.record(1, ROW, [ROLLOUT])


def test_a_rank_that_does_not_write_does_not_mind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with open_log(tmp_path / "file" / "run", enabled=False) as log:
        log.record(1, ROW, [ROLLOUT])
        log.summarise(checkpoint=tmp_path / "latest", export=None)


def test_the_scores_of_tasks_are_told_a_line_each() -> None:
    row: dict[str, float] = {"eval/reverse_kl": 0.5, "eval/aime/tokens": 9.0}
    for name, mean in (("aime/avg@8", 0.25), ("aime/pass@8", 0.5), ("my.task/avg@1", 1.0)):
        row |= {f"eval/{name}": mean, f"eval/{name}_low": mean / 2, f"eval/{name}_high": 1.0}
    assert task_lines(row) == [
        "aime avg@8 25.0% [12.5%, 100.0%], pass@8 50.0% [25.0%, 100.0%]",
        "my.task avg@1 100.0% [50.0%, 100.0%]",
    ]


def test_samples_of_evaluations_that_no_longer_count_are_removed(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / "evaluation" / f"step_{step:08d}").mkdir(parents=True)
    with RunLog(tmp_path, start=1, steps=2, enabled=True, decode=str):
        assert [path.name for path in (tmp_path / "evaluation").iterdir()] == ["step_00000001"]
