"""A whole run whose rollouts a real SGLang server draws: killed, it leaves no process behind, and resumes."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from megatron_opd.checkpoint.store import published
from tests.sglang_server import SEEDED, sglang_python
from tests.test_train import command, inputs, metrics, run, write_config

__all__ = ["inputs"]


def servers_of(run_dir: Path) -> list[psutil.Process]:
    """The processes that serve weights of this run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(run_dir / "servers") in word for word in process.info["cmdline"] or ()):
            found += [process, *process.children(recursive=True)]
    return found


def test_a_run_on_served_rollouts_is_killed_and_resumes(inputs, tmp_path):
    run_dir = tmp_path / "run"
    served: dict[str, Any] = {"python": str(sglang_python()), "arguments": list(SEEDED), "concurrency": 8}
    served["host"] = "127.0.0.2"  # not the loopback address that needs no key
    config = write_config(
        inputs,
        run_dir,
        rollout__engine="sglang",
        rollout__weight_sync="tensor",
        rollout__sglang=served,
        rollout__top_p=0.9,
        objective__kept_ids_only=True,
        checkpoint__save_every=1,
        training__steps=6,
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    trainer = subprocess.Popen(command("train", config), stdout=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 400
    while not (published(run_dir / "checkpoints") and metrics(run_dir)[-1]["step"] > 1):
        assert time.monotonic() < deadline and trainer.poll() is None, "no save to kill after"
        time.sleep(0.01)
    serving = servers_of(run_dir)
    assert len(serving) > 2, "guard, HTTP server and scheduler"
    words = serving[0].cmdline()
    stranger = httpx.post(
        f"http://127.0.0.2:{words[words.index('--port') + 1]}/generate", json={"input_ids": [5]}
    )
    assert stranger.status_code == 401
    started = psutil.Process(trainer.pid).children(
        recursive=True
    )  # a writer of a checkpoint may be among them
    assert set(serving) <= set(started)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive

    again = run("train", config)
    assert again.returncode == 0, again.stderr
    assert "resuming at step" in again.stdout and "SGLang: 1 ready after" in again.stdout
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(7))
    assert all(row["logprob_mismatch"] < 1e-4 for row in rows[1:]), "the server has the weights of every step"
    assert rows[-1]["eval/reverse_kl"] < rows[0]["eval/reverse_kl"]
    assert not servers_of(run_dir) and not (run_dir / "servers" / "weights").exists()
