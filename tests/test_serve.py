"""`megatron-opd serve` without a server: what it refuses, and how servers are started that have a machine alone."""

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.cli import main
from megatron_opd.config.load import load_config
from megatron_opd.launch.worker import EXIT_FILE
from megatron_opd.serve import machine_settings
from tests.test_train import inputs, write_config

__all__ = ["inputs"]


def served(inputs: Path, folder: Path, **changes: Any) -> Path:
    """A run with servers for rollouts and teacher; they end at once."""
    python = folder / "python"
    python.write_text("#!/bin/sh\necho no SGLang here\nexit 3\n")
    python.chmod(0o755)
    both = {
        f"{role}__{key}": value
        for role in ("rollout", "teacher")
        for key, value in (("engine", "sglang"), ("sglang", {"python": str(python), "servers": 2}))
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
    own = {"teacher__prompt_template": "as asked: {prompt}", "teacher__max_prompt_tokens": 64}
    config = load_config(served(inputs, tmp_path, **own), ["rollout.top_k=5"])
    rollout, teacher = (machine_settings(config, role) for role in ("rollout", "teacher"))
    assert (rollout.longest, teacher.longest) == (32 + 8, 64 + 8)
    assert rollout.stop_ids and not teacher.stop_ids
    assert rollout.arguments == ("--sampling-mask-max-tokens", "250") and teacher.arguments == ()
    assert (rollout.host, rollout.count, teacher.key) == ("0.0.0.0", 2, "teacher.sglang")
