"""Whole runs with a teacher behind a server that the run starts, and one beside the server of the rollouts."""

from typing import Any

import pytest

from tests.forked import run_forked
from tests.sglang_server import SEEDED, sglang_python
from tests.test_train import inputs, metrics, write_config
from tests.test_train_sglang import servers_of

__all__ = ["inputs"]


@pytest.mark.parametrize("engine", ["local", pytest.param("sglang", marks=pytest.mark.full)])
def test_a_run_learns_from_a_teacher_that_it_serves(inputs, tmp_path, engine):
    run_dir = tmp_path / "run"
    served: dict[str, Any] = {"python": str(sglang_python()), "concurrency": 8}
    changes: dict[str, Any] = {"teacher__engine": "sglang", "teacher__sglang": served}
    if engine == "sglang":
        changes |= {"rollout__engine": engine, "rollout__sglang": {**served, "arguments": list(SEEDED)}}
    config = write_config(
        inputs, run_dir, **changes, teacher__request_tokens=5, objective__preset="lsm", training__steps=12
    )
    done = run_forked("train", config)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SGLang: 1 ready after") == (2 if engine == "sglang" else 1)
    assert "held-out reverse KL, estimated from sampled tokens: " in done.stdout
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(13))
    distances = [row["eval/reverse_kl_sampled"] for row in rows if "eval/reverse_kl_sampled" in row]
    assert len(distances) == 5 and distances[-1] < distances[0]
    assert rows[-1]["topk_divergence"] < rows[1]["topk_divergence"]
    assert not any(name.endswith("reverse_kl") for row in rows for name in row), "it is not known"
    assert (run_dir / "curve.png").is_file() and (run_dir / "servers/teacher/server-0.log").is_file()
    assert not servers_of(run_dir) and not servers_of(inputs.parent)

    again = run_forked("train", config)  # finished: no server is started
    assert again.returncode == 0 and "ready after" not in again.stdout
