"""`megatron-opd serve` without SGLang: what it refuses, how servers with a machine alone are started, and ended."""

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_opd.cli import main
from megatron_opd.config.load import load_config
from megatron_opd.launch.worker import EXIT_FILE
from megatron_opd.serve import machine_settings
from tests.test_train import command, inputs, write_config

__all__ = ["inputs"]


ENDING = "#!/bin/sh\necho no SGLang here\nexit 3\n"
ANSWERING = f"""#!{sys.executable}
import http.server, sys
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("0.0.0.0", port), Healthy).serve_forever()
"""


def served(inputs: Path, folder: Path, program: str = ENDING, servers: int = 2, **changes: Any) -> Path:
    """A run with servers for rollouts and teacher, which are this program."""
    python = folder / "python"
    python.write_text(program)
    python.chmod(0o755)
    both = {
        f"{role}__{key}": value
        for role in ("rollout", "teacher")
        for key, value in (("engine", "sglang"), ("sglang", {"python": str(python), "servers": servers}))
    }
    return write_config(inputs, folder / "run", objective__preset="iw-opd", **both | changes)


@pytest.mark.parametrize(
    ("role", "overrides", "line"),
    [
        (
            "rollout",
            ["rollout.sglang.urls=[http://a:1]", "rollout.sglang.python=null"],
            "rollout.sglang.python: ",
        ),
        ("teacher", ["teacher.engine=megatron"], "teacher.sglang.python: set it"),
        ("rollout", ["student.path=nowhere"], "nowhere"),
        ("teacher", ["teacher.path=nowhere"], "teacher.path: nowhere has no *.safetensors"),
        ("rollout", ["rollout.sglang.outage_timeout=60"], "exit code 3 while it started: no SGLang here"),
        ("elsewhere", [], "elsewhere"),
    ],
)
def test_a_mistake_is_one_line(
    role: str,
    overrides: list[str],
    line: str,
    inputs: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SGLANG_API_KEY", "secret")
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "exit"))
    with pytest.raises(SystemExit) as end:
        main(["serve", role, str(served(inputs, tmp_path)), *overrides])
    err = capsys.readouterr().err
    assert end.value.code == (1 if "exit code 3" in line else 2)  # a server that ends is no mistake
    assert not (tmp_path / "exit").exists() or role == "elsewhere"
    assert not (tmp_path / "exit").exists() or role == "elsewhere"
    assert len(re.findall(r"\n", err)) == 1 and line in err, err


def test_servers_without_a_key(inputs: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "rollout", str(served(inputs, tmp_path))])
    assert "error: SGLANG_API_KEY: set this variable" in capsys.readouterr().err


def test_settings_are_those_that_the_run_would_start_with(inputs: Path, tmp_path: Path) -> None:
    own: dict[str, Any] = {"teacher__prompt_template": "as asked: {prompt}", "teacher__max_prompt_tokens": 64}
    config = load_config(served(inputs, tmp_path, **own), ["rollout.top_k=5"])
    rollout, teacher = (machine_settings(config, role) for role in ("rollout", "teacher"))
    assert (rollout.longest, teacher.longest) == (32 + 8, 64 + 8)
    assert rollout.stop_ids and not teacher.stop_ids
    assert rollout.arguments == ("--sampling-mask-max-tokens", "250") and teacher.arguments == ()
    assert (rollout.host, rollout.count, teacher.key) == ("0.0.0.0", 2, "teacher.sglang")


@pytest.mark.parametrize("step", ["", "0"], ids=["by itself", "in a step of a job"])
def test_a_signal_to_a_whole_job_is_not_for_its_servers(step: str, inputs: Path, tmp_path: Path) -> None:
    """They end with a SIGTERM to themselves, and by SIGKILL; the servers with them."""
    config = served(inputs, tmp_path, ANSWERING, servers=1)
    with closing(socket.create_server(("", 0))) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "SGLANG_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
    environment.pop("SLURM_STEP_ID", None)
    words = ["serve", f"--port={port}", "teacher", config]
    process = subprocess.Popen(
        command(*words),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=environment | ({"SLURM_STEP_ID": step} if step else {}),
    )
    try:
        assert process.stdout is not None and "SGLang: 1 ready" in process.stdout.readline()
        (guard,) = psutil.Process(process.pid).children()
        server = guard.children()[0]
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            assert ignores(process, number) == (bool(step) or number == signal.SIGUSR1)
            process.send_signal(number)
        if step:
            process.kill()
        assert process.wait(60) == (-signal.SIGKILL if step else 128 + signal.SIGTERM)
        assert psutil.wait_procs([guard, server], timeout=60)[1] == []
    finally:
        process.kill()


def ignores(process: subprocess.Popen[str], number: int) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = int(next(line for line in status.splitlines() if line.startswith("SigIgn")).split()[1], 16)
    return bool(mask >> (number - 1) & 1)
