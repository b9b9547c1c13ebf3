"""Runs on a real SLURM cluster: submitted by the command, signalled, failing, with nodes that die."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.cli import main
from tests.forked import run_forked
from tests.slurm_cluster import SlurmCluster, slurm_cluster, text, until
from tests.test_train import inputs, metrics, write_config
from tests.test_train_own_teacher import assert_same

__all__ = ["inputs", "slurm_cluster"]

Submit = Callable[..., str]


@pytest.fixture
def submit(
    slurm_cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> Submit:
    """`submit(config, *options)`: the number of the job. What it prints comes to `tmp_path`."""
    for name, value in slurm_cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def act(config: Path, *options: object) -> str:
        words = ["--gpus-per-node=0", f"--local-tmp={tmp_path}", *map(str, options)]
        with pytest.raises(SystemExit) as end:
            main(["launch", "slurm", str(config), *words])
        out, err = capfd.readouterr()
        assert end.value.code == 0, err
        found = re.match(r"submitted job (\d+)", out)
        assert found, out
        return found[1]

    return act


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A program in the place of `megatron-opd`, for ends that a run takes long to come to."""
    program = tmp_path / "bin" / "megatron-opd"
    program.parent.mkdir()
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{__import__('os').environ['PATH']}")


def test_two_nodes_with_two_processes_each(
    inputs: Path, tmp_path: Path, slurm_cluster: SlurmCluster, submit: Submit
) -> None:
    """The second node has the teacher alone."""
    own = {"teacher__parallel": {"separate": True, "pipeline": 2}}
    config = write_config(inputs, tmp_path / "run", **own)
    job = submit(config, "--nodes=2", "--processes-per-node=2")
    log = tmp_path / f"run-{job}.log"
    found = slurm_cluster.wait(job, "COMPLETED", log)
    assert found["NumNodes"] == "2" and found["NumTasks"] == "4" and found["Restarts"] == "0"
    assert "PP2·CP1·DP1 on processes 2 to 3" in text(log)
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(7))
    assert not list((tmp_path / "run").glob("slurm-*"))
