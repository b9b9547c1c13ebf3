"""The batch scripts: the examples are what the command writes, shells read them, mistakes are found before a job."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.cli import main
from megatron_opd.launch.slurm import ServerNodes, SlurmJob, render

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "slurm"
COMMANDS = {
    line.rpartition("/")[2]: shlex.split(line)[1:-2]
    for line in (EXAMPLES / "README.md").read_text().splitlines()
    if line.startswith("megatron-opd launch slurm")
}
PLAIN = "examples/plans/qwen3-30b-a3b-to-4b.yaml"
SERVED = "examples/slurm/sglang.yaml"


@pytest.fixture(autouse=True)
def at_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def said(capsys: Any, arguments: Sequence[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert isinstance(end.value.code, int)
    return end.value.code, *capsys.readouterr()


def shell_reads(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "--severity=warning", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_every_script_is_in_the_readme() -> None:
    assert set(COMMANDS) == {path.name for path in EXAMPLES.glob("*.sh")}
    table = (EXAMPLES / "README.md").read_text()
    assert all(f"]({name})" in table for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_is_what_the_command_writes(name: str, capsys: Any) -> None:
    assert said(capsys, COMMANDS[name]) == (0, (EXAMPLES / name).read_text(), "")
    shell_reads(EXAMPLES / name)


def test_names_that_a_shell_would_read_arrive_as_they_are(tmp_path: Path) -> None:
    odd = ["a b.yaml", 'data.system_prompt=it\'s $HOME; `x` "y"', "rollout.sglang.gpus=[0, 1]"]
    job = SlurmJob(
        arguments=odd,
        run_dir=Path("runs/it's $(odd)"),
        name="x",
        nodes=1,
        processes_per_node=1,
        ranks=1,
        environment=["NAME=a $b 'c'"],
        local_tmp="/tmp/a b",
    )
    script = tmp_path / "script.sh"
    script.write_text(render(job))
    shell_reads(script)
    head = script.read_text().partition("# 16 ports")[0]
    show = 'printf "%s\\n" "${config[@]}" "$run_dir" "$NAME" "$caches"'
    done = subprocess.run(
        ["bash", "-c", head + show], capture_output=True, text=True, env={"SLURM_JOB_USER": "me"}
    )
    expected = [*odd, str(job.run_dir), "a $b 'c'", "/tmp/a b/megatron-opd-me"]
    assert done.stdout.splitlines() == expected, done.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            [PLAIN, "--nodes", "3"],
            "--nodes: the layouts in examples/plans/qwen3-30b-a3b-to-4b.yaml ask for 32",
        ),
        (
            [PLAIN, "parallel.tensor=3", "parallel.data=null", "--nodes=3"],
            "parallel.tensor: 3 does not divide",
        ),
        ([SERVED, "parallel.tensor=8", "--nodes=1", "--gpus-per-node=4"], "parallel: "),
        ([PLAIN, "--nodes=4", "--rollout-nodes=1"], "--rollout-nodes: the run starts no servers for them"),
        ([PLAIN, "--nodes=4", "--teacher-nodes=1"], "--teacher-nodes: the run starts no servers for them"),
        (
            [SERVED, "rollout.sglang.servers=14", "--rollout-nodes=1", "--teacher-nodes=1"],
            "15 servers a node",
        ),
        (
            [SERVED, "rollout.weight_sync=tensor", "--rollout-nodes=1"],
            "weight_sync: tensor is for servers on",
        ),
        ([PLAIN, "--nodes=4", "--env=A-B"], "--env: 'A-B' is not NAME=VALUE"),
        ([PLAIN, "--nodes=4", "--env=A-B=1"], "--env: 'A-B=1' is not NAME=VALUE"),
        ([PLAIN, "rolout.top_k=1", "--nodes=4"], "rolout"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], line: str, capsys: Any) -> None:
    code, out, err = said(capsys, ["launch", "slurm", *arguments, "--render-only"])
    assert (code, out, err.count("\n")) == (2, "", 1) and line in err, err


def test_what_a_run_needs_is_looked_for_before_it_is_submitted(capsys: Any) -> None:
    code, _, err = said(capsys, ["launch", "slurm", PLAIN, "--nodes=4"])
    assert code == 2 and "data.prompts: prompts.jsonl does not exist" in err


def test_a_machine_without_slurm(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n')
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = said(capsys, ["launch", "slurm", PLAIN, f"data.prompts={prompts}", "--nodes=4"])
    assert code == 2 and "cannot run sbatch" in err


@pytest.mark.parametrize(
    ("patience", "saves", "expected"),
    [(60, "sys.exit(75)", 75), (1, "None", 143)],
    ids=["the run saves", "the run does not save in time"],
)
def test_servers_that_end_before_the_run(patience: int, saves: str, expected: int, tmp_path: Path) -> None:
    """The end of the script, with small programs for steps: a run saves when told, or ends by itself."""
    job = SlurmJob(
        arguments=["run.yaml"],
        run_dir=tmp_path,
        name="x",
        nodes=1,
        processes_per_node=1,
        ranks=1,
        servers=[ServerNodes(role="rollout", nodes=1, servers=1)],
        signal_seconds=patience,
    )
    watching = "wait -n" + render(job).partition("wait -n")[2].partition("\nif [ -s")[0]
    (tmp_path / "run.py").write_text(
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGUSR1, lambda *_: {saves})\n"
        "pathlib.Path('ready').touch()\n"
        "while True:\n"
        "    time.sleep(0.1)\n"
    )
    steps = (
        f"run_dir=.\n{sys.executable} -S run.py &\nrun=$!\n"
        "(until [ -e ready ]; do sleep 0.1; done; exit 1) &\nservers=($!)\n"
    )
    done = subprocess.run(
        ["bash", "-c", f'{steps}{watching}\nexit "$code"'], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == expected and "servers have ended before the run" in done.stderr, done
