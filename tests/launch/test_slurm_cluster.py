"""Runs on a real SLURM cluster: submitted by the command, signalled, failing, with nodes that die."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.checkpoint.store import published
from megatron_opd.cli import main
from tests.forked import run_forked
from tests.sglang_server import SEEDED, sglang_python
from tests.slurm_cluster import SlurmCluster, slurm_cluster, text, until
from tests.test_serve import ANSWERING, served
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


@pytest.fixture
def stand_in(tmp_path: Path, submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of `megatron-opd` a program that ends as CODES says of every start: with a new checkpoint at 75."""
    program = tmp_path / "bin" / "megatron-opd"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\n"
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from megatron_opd.launch.worker import leave_exit_code\n"
        "codes = os.environ['CODES'].split(',')\n"
        "start = int(os.environ.get('SLURM_RESTART_COUNT', 0)) + int(os.environ.get('SLURM_ARRAY_TASK_ID', 1))\n"
        "code = codes[min(start, len(codes)) - 1]\n"
        "saves, code = code == '75', int(code.removesuffix(' unsaved'))\n"
        "names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'SLURMD_NODENAME')\n"
        "print('started', *(os.environ[name] for name in names), flush=True)\n"
        "time.sleep(0.1 * int(os.environ['RANK']))\n"
        "if saves and os.environ['RANK'] == '0':\n"
        "    latest = Path('run/checkpoints/latest')\n"
        "    latest.parent.mkdir(exist_ok=True)\n"
        "    latest.unlink(missing_ok=True)\n"
        "    latest.symlink_to(f'step_{start}')\n"
        "_ = code in (2, 75) and leave_exit_code(code)\n"
        "sys.exit(code)\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def steps_so_far(run_dir: Path) -> list[str]:
    """The rows of metrics that a run has written until now."""
    return text(run_dir / "metrics.jsonl").splitlines()


def curve(inputs: Path, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """The metrics of the run in one process, undisturbed."""
    done = run_forked("train", write_config(inputs, folder / "undisturbed", **changes))
    assert done.returncode == 0, done.stderr
    return metrics(folder / "undisturbed")


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


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("codes", "state", "restarts"),
    [
        ("75,75,75,0", "COMPLETED", "3"),
        ("75 unsaved", "FAILED", "1"),
        ("2", "FAILED", "0"),
        pytest.param("1,0", "COMPLETED", "1", marks=pytest.mark.full),
        pytest.param("1", "FAILED", "1", marks=pytest.mark.full),
    ],
)
def test_what_follows_an_exit_code(
    codes: str,
    state: str,
    restarts: str,
    inputs: Path,
    tmp_path: Path,
    slurm_cluster: SlurmCluster,
    submit: Submit,
) -> None:
    """The ranks end one after the other, and `srun` kills the later ones: its own code is theirs."""
    config = write_config(inputs, tmp_path / "run")
    more = ["--nodes=2", "--processes-per-node=2", "--retries=1"]
    job = submit(config, *more, f"--env=CODES={codes}")
    found = slurm_cluster.wait(job, state, tmp_path / f"run-{job}.log")
    assert found["Restarts"] == restarts, text(tmp_path / f"run-{job}.log")


@pytest.mark.usefixtures("stand_in")
def test_ranks_fill_the_nodes_in_order(
    inputs: Path, tmp_path: Path, slurm_cluster: SlurmCluster, submit: Submit
) -> None:
    """Though there are more CPUs than processes: the last node has what is left."""
    config = write_config(inputs, tmp_path / "run", parallel__data=5, rollout__prompts_per_step=5)
    job = submit(config, "--nodes=3", "--processes-per-node=2", "--sbatch=exclusive", "--env=CODES=0")
    log = tmp_path / f"run-{job}.log"
    slurm_cluster.wait(job, "COMPLETED", log)
    ranks = sorted(line.split()[1:] for line in text(log).splitlines() if line.startswith("started"))
    assert ranks == [[str(rank), "5", str(rank % 2), f"n{1 + rank // 2}"] for rank in range(5)], text(log)


@pytest.mark.usefixtures("stand_in")
def test_a_chain_goes_on_until_the_run_is_finished(
    inputs: Path, tmp_path: Path, slurm_cluster: SlurmCluster, submit: Submit
) -> None:
    job = submit(write_config(inputs, tmp_path / "run"), "--nodes=1", "--chain=5", "--env=CODES=75,1,0,1,1")
    until(lambda: not slurm_cluster.run("squeue", "-h", "-j", job), lambda: slurm_cluster.run("squeue"))
    lines = slurm_cluster.run("scontrol", "-o", "show", "job", job).splitlines()
    jobs = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
    states = {each["ArrayTaskId"]: each["JobState"] for each in jobs}
    assert [states.pop(task) for task in "123"] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert list(states.values()) == ["CANCELLED"]  # what is left of the array, under a number of its own


def test_a_run_that_is_told_to_stop_goes_on_later(
    inputs: Path, tmp_path: Path, slurm_cluster: SlurmCluster, submit: Submit
) -> None:
    """As before the time limit: SIGUSR1 to every rank."""
    changes = {"training__steps": 30, "checkpoint__save_every": 0}
    expected = curve(inputs, tmp_path, **changes)
    job = submit(write_config(inputs, tmp_path / "run", **changes), "--nodes=2", "--processes-per-node=1")
    log = tmp_path / f"run-{job}.log"
    until(lambda: len(steps_so_far(tmp_path / "run")) > 2, lambda: text(log), 400)
    slurm_cluster.run("scancel", "--signal=USR1", job)
    found = slurm_cluster.wait(job, "COMPLETED", log)
    assert found["Restarts"] == "1"
    assert f"job {job} is queued again" in text(log) and "resuming at step" in text(log)
    assert_same(metrics(tmp_path / "run"), expected)


def test_a_run_goes_on_when_a_node_dies(
    inputs: Path, tmp_path: Path, slurm_cluster: SlurmCluster, submit: Submit
) -> None:
    """On the nodes that are left."""
    changes = {"training__steps": 30, "checkpoint__save_every": 3}
    expected = curve(inputs, tmp_path, **changes)
    job = submit(write_config(inputs, tmp_path / "run", **changes), "--nodes=2", "--processes-per-node=1")
    log = tmp_path / f"run-{job}.log"
    until(lambda: bool(published(tmp_path / "run" / "checkpoints")), lambda: text(log), 400)
    assert slurm_cluster.job(job)["NodeList"] == "n[1-2]"
    slurm_cluster.kill_node("n2")
    try:
        found = slurm_cluster.wait(job, "COMPLETED", log)
    finally:
        slurm_cluster.start_node("n2")
    assert (found["Restarts"], found["NodeList"]) == ("1", "n[1,3]"), text(log)
    assert "resuming at step" in text(log)
    assert_same(metrics(tmp_path / "run"), expected)


def test_a_signal_to_the_whole_job_leaves_the_servers_to_the_run(
    inputs: Path, tmp_path: Path, slurm_cluster: SlurmCluster, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at pre-emption. In the place of the ranks a program that saves if its teacher answers after the signal."""
    program = tmp_path / "bin" / "megatron-opd"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\n"
        "import os, re, signal, sys, time, urllib.request\n"
        "from pathlib import Path\n"
        "from megatron_opd.launch.worker import leave_exit_code\n"
        "if sys.argv[1] == 'serve':\n"
        "    os.execv(sys.executable, [sys.executable, '-m', 'megatron_opd.cli', *sys.argv[1:]])\n"
        "if 'SLURM_RESTART_COUNT' in os.environ:\n"
        "    sys.exit(0)\n"
        "def save(*_):\n"
        "    time.sleep(3)\n"
        "    url = re.search(r'teacher.sglang.urls=\\[(.*?)\\]', ' '.join(sys.argv))[1]\n"
        "    urllib.request.urlopen(url + '/health')\n"
        "    Path('run/checkpoints').mkdir()\n"
        "    Path('run/checkpoints/latest').symlink_to('step_1')\n"
        "    leave_exit_code(75)\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "Path('ready').touch()\n"
        "time.sleep(100)\n"
        "sys.exit(1)\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    config = served(inputs, tmp_path, ANSWERING, servers=1)
    job = submit(config, "--nodes=1", "--processes-per-node=1", "--teacher-nodes=1", "--retries=0")
    log = tmp_path / f"run-{job}.log"
    until((tmp_path / "ready").exists, lambda: text(log), 200)
    slurm_cluster.run("scancel", "--signal=TERM", job)
    found = slurm_cluster.wait(job, "COMPLETED", log)
    assert found["Restarts"] == "1" and text(log).count("SGLang: 1 ready") == 2, text(log)
    assert "servers have ended before the run" not in text(log)


@pytest.mark.full
def test_servers_on_nodes_of_their_own(
    inputs: Path, tmp_path: Path, slurm_cluster: SlurmCluster, submit: Submit
) -> None:
    """One node draws, one is the teacher; the same configuration has both on one machine with `launch local`."""
    served = {"engine": "sglang", "sglang": {"python": str(sglang_python()), "arguments": list(SEEDED)}}
    changes: dict[str, Any] = {f"rollout__{key}": value for key, value in served.items()}
    changes |= {f"teacher__{key}": value for key, value in served.items()}
    changes |= {"objective__preset": "iw-opd", "training__steps": 2, "evaluation__every": 0}
    more = ["--nodes=1", "--processes-per-node=1", "--rollout-nodes=1", "--teacher-nodes=1"]
    job = submit(write_config(inputs, tmp_path / "run", **changes), *more)
    log = tmp_path / f"run-{job}.log"
    found = slurm_cluster.wait(job, "COMPLETED", log, 590)
    assert (found["NumNodes"], found["Restarts"]) == ("3", "0")
    assert "n2: SGLang: 1 ready" in text(log) and "n3: SGLang: 1 ready" in text(log), text(log)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2]
    assert all(row["logprob_mismatch"] < 1e-4 for row in metrics(tmp_path / "run")[1:])


@pytest.mark.full
def test_a_chain_over_time_limits(
    inputs: Path, tmp_path: Path, slurm_cluster: SlurmCluster, submit: Submit
) -> None:
    """SLURM counts in minutes, and its signal comes up to a minute early: after 30 s of two minutes at the soonest."""
    changes = {"training__steps": 100_000, "checkpoint__save_every": 0, "evaluation__prompts": None}
    config = write_config(inputs, tmp_path / "run", **changes, evaluation__every=0)
    job = submit(
        config, "--nodes=2", "--processes-per-node=1", "--chain=2", "--time=2", "--signal-seconds=30"
    )
    log = tmp_path / f"run-{job}_2.log"
    until(lambda: not slurm_cluster.run("squeue", "-h", "-j", job), lambda: text(log), 500)
    first = text(tmp_path / f"run-{job}_1.log")
    assert "stopped by SIGUSR1 after step" in first and "stopped by SIGUSR1 after step" in text(log), first
    assert "resuming at step" in text(log)
    steps = [row["step"] for row in metrics(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))


def test_the_doctor_looks_at_both_nodes_and_between_them(
    slurm_cluster: SlurmCluster, inputs: Path, tmp_path: Path
) -> None:
    """Rank 0 prints. The names of these nodes are in no name service."""
    config = write_config(inputs, tmp_path / "run", parallel__data=2)
    done = subprocess.run(
        ["srun", "-N2", "-n2", sys.executable, "-m", "megatron_opd.cli", "doctor", str(config)],
        env={**slurm_cluster.environment, "MASTER_ADDR": "127.0.0.1", "COLUMNS": "250"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    said = ("2 on 2 nodes", "fits 2 processes", "seen on 2 nodes", "the slowest of 2 nodes", "gloo n1 - n2")
    assert [each for each in said if done.stdout.count(each) != 1] == [], done.stdout
    assert not list(tmp_path.glob(".doctor*"))
