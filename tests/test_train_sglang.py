"""A whole run whose rollouts a real SGLang server draws: killed, it leaves no process behind, and resumes."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from megatron_opd.checkpoint.published import published
from tests.data.tiny_tokenizer import save_tokenizer
from tests.forked import run_forked
from tests.sglang_server import SEEDED, SGLangServer, sglang_python
from tests.test_train import check_ledger, command, inputs, metrics, write_config
from tests.tiny import save_tiny_model

__all__ = ["inputs"]


def servers_of(run_dir: Path) -> list[psutil.Process]:
    """The processes that serve weights of this run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(run_dir / "servers") in word for word in process.info["cmdline"] or ()):
            found += [process, *process.children(recursive=True)]
    return found


def kill(trainer: subprocess.Popen[bytes], servers: list[psutil.Process]) -> None:
    """Kill a trainer; its servers and what else it has started end by themselves."""
    # A writer of a checkpoint may be among them.
    started = psutil.Process(trainer.pid).children(recursive=True)
    assert set(servers) <= set(started)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive


def start_and_wait(config: Path, run_dir: Path) -> subprocess.Popen[bytes]:
    """A trainer that is past its first checkpoint and the step after it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    trainer = subprocess.Popen(command("train", config), stdout=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 400
    while not (published(run_dir / "checkpoints") and metrics(run_dir)[-1]["step"] > 1):
        assert time.monotonic() < deadline and trainer.poll() is None, "no save to kill after"
        time.sleep(0.01)
    return trainer


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
    trainer = start_and_wait(config, run_dir)
    serving = servers_of(run_dir)
    assert len(serving) > 2, "guard, HTTP server and scheduler"
    words = serving[0].cmdline()
    stranger = httpx.post(
        f"http://127.0.0.2:{words[words.index('--port') + 1]}/generate", json={"input_ids": [5]}
    )
    assert stranger.status_code == 401
    kill(trainer, serving)

    again = run_forked("train", config)
    assert again.returncode == 0, again.stderr
    assert "resuming at step" in again.stdout and "SGLang: 1 ready after" in again.stdout
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(7))
    assert all(row["logprob_mismatch"] < 1e-4 for row in rows[1:]), "the server has the weights of every step"
    assert rows[-1]["eval/reverse_kl"] < rows[0]["eval/reverse_kl"]
    assert not servers_of(run_dir) and not (run_dir / "servers" / "weights").exists()


def test_a_run_with_rollouts_ahead_is_killed_and_loses_none(inputs, tmp_path, sglang: SGLangServer):
    """Killed with responses on their way, at a server that outlives it; the rest is trained with what is due."""
    run_dir = tmp_path / "run"
    save_tiny_model(tmp_path / "student", seed=1, tied=False)
    save_tokenizer(tmp_path / "student")
    config = write_config(
        inputs,
        run_dir,
        student__path=str(tmp_path / "student"),
        rollout__engine="sglang",
        rollout__sglang={"urls": [sglang.url], "concurrency": 8},
        rollout__samples_per_prompt=2,
        rollout__max_staleness=1,
        objective__preset="opd",
        checkpoint__save_every=1,
        training__steps=8,
    )
    try:
        kill(start_and_wait(config, run_dir), [])
        again = run_forked("train", config)
    finally:
        with sglang.engine() as engine:
            engine.ask_all("/continue_generation", {})  # a killed run may have left it paused
        sglang.load(sglang.models[0], "0")
    assert again.returncode == 0, again.stderr
    assert "resuming at step" in again.stdout
    for row in check_ledger(inputs, run_dir, steps=8, samples=2):
        versions = [version for each in row["rollouts"] for version in each["versions"]]
        assert row["step"] - 2 <= min(versions) and max(versions) <= row["step"] - 1
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(9))
    ahead = [row for row in rows[1:] if row["staleness"] > 0]
    assert ahead and all(0 < row["staleness"] <= row["staleness_max"] == 1 for row in ahead)
    for row in rows[
        1:
    ]:  # the weights that drew are the student's, or the importance ratio says how they differ
        fresh = row["staleness"] == 0
        assert (row["logprob_mismatch"] < 1e-4) == fresh
        assert abs(row["importance"] - 1) < 1e-5 or not fresh
    assert any(abs(row["importance"] - 1) > 1e-4 for row in ahead)
