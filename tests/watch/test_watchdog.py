"""The watchdog of every rank: who is where when one hangs in another phase, or is gone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opd.launch.local import run_workers

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers find the package as this session does."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_a_rank_in_another_phase_is_named_and_all_stacks_are_kept(tmp_path: Path) -> None:
    """Rank 0 waits in a reduction of the step that rank 1 never comes to."""
    outcome = run_workers([str(WORKER), "elsewhere", str(tmp_path)], 2)
    assert outcome.exit_code == 1 and outcome.message is not None
    assert re.match(r"rank 0 has been in step for \d+ s \(section timeouts: at most 3\): ", outcome.message)
    assert re.search(r"rank 1 is in rollout \(\d+ s\); the stacks of all ranks are in", outcome.message)
    stacks = {path.name: path.read_text() for path in (tmp_path / "stacks").iterdir()}
    assert sorted(stacks) == ["rank_00000.txt", "rank_00001.txt"]
    assert "all_reduce" in stacks["rank_00000.txt"] and "draw_for_ever" in stacks["rank_00001.txt"]


def test_the_rank_that_is_left_says_who_is_gone(tmp_path: Path) -> None:
    """As under a launcher that does not end all when one ends."""
    outcome = run_workers([str(WORKER), "gone", str(tmp_path)], 2)
    assert outcome.exit_code == 1 and outcome.message is not None
    assert re.match(
        r"rank 0 has lost its connection to another in step: rank 1 is silent for \d+ s, last in rollout",
        outcome.message,
    )


def test_one_process_has_a_watchdog_too(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, WORKER, "elsewhere", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.match(r"error: rank 0 has been in rollout for \d+ s", done.stderr), done.stderr
    assert "draw_for_ever" in (tmp_path / "stacks" / "rank_00000.txt").read_text()
