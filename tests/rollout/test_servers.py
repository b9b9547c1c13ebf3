"""Servers that do not start, and what a server is started with; those that do start are in test_sglang_faults."""

import stat
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_opd.errors import Outage, UserError
from megatron_opd.rollout.server_start import ServerSettings
from megatron_opd.rollout.servers import Servers, last_line

SETTINGS = ServerSettings(
    python=Path(sys.executable), count=2, dtype="float32", longest=64, concurrency=4, start_timeout=60.0
)


def script(path: Path, text: str) -> Path:
    """Something that takes the place of the interpreter."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_an_environment_without_sglang_is_named_with_the_log(tmp_path: Path) -> None:
    before = children()
    servers = Servers(SETTINGS, tmp_path / "servers", print)
    with pytest.raises(Outage, match=r"ended with exit code 1 .* No module named '?sglang.*server-\d\.log"):
        servers.start(tmp_path, "0")
    assert children() <= before


def test_a_server_that_never_answers_is_ended_in_time(tmp_path: Path) -> None:
    before = children()
    python = script(tmp_path / "python", "echo still loading; exec sleep 600")
    servers = Servers(replace(SETTINGS, python=python, start_timeout=1.0), tmp_path / "servers", print)
    with pytest.raises(Outage, match=r"^rollout\.sglang\.outage_timeout: .* still loading"):
        servers.start(tmp_path, "0")
    assert children() <= before


def test_the_environment_is_not_that_of_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    python = script(tmp_path / "python", "env; exit 5")
    servers = Servers(replace(SETTINGS, python=python, count=1), tmp_path / "servers", print)
    with pytest.raises(UserError, match="exit code 5"):
        servers.start(tmp_path, "0")
    log = (tmp_path / "servers" / "server-0.log").read_text()
    names = {line.partition("=")[0] for line in log.splitlines()}
    assert "PATH" in names and not names & {"RANK", "TORCHELASTIC_RUN_ID"}


def test_beyond_loopback_a_key_is_asked_for_and_nobody_else_can_read_it(tmp_path: Path) -> None:
    python = script(tmp_path / "python", "exit 5")
    settings = replace(SETTINGS, python=python, host="0.0.0.0")
    servers = Servers(settings, tmp_path / "servers", print)
    assert Servers(SETTINGS, tmp_path, print).api_key is None
    assert servers.api_key is not None and len(servers.api_key) > 30
    with pytest.raises(UserError):
        servers.start(tmp_path, "0")
    command = servers.command(port=1)
    assert not any(servers.api_key in word for word in command)
    file = Path(command[command.index("--config") + 1])
    assert servers.api_key in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_users_arguments_come_last(tmp_path: Path) -> None:
    python = script(tmp_path / "python", "exit 5")
    settings = replace(SETTINGS, python=python, arguments=("--tp-size", "2"))
    servers = Servers(settings, tmp_path / "servers", print)
    with pytest.raises(UserError):
        servers.start(tmp_path / "model", "17")
    command = servers.command(port=1234)
    assert command[-2:] == ["--tp-size", "2"]
    assert command[command.index("--model-path") + 1] == str(tmp_path / "model")
    assert command[command.index("--weight-version") + 1] == "17"
    assert command[command.index("--port") + 1] == "1234"


def test_the_last_line_that_says_something(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_line(log) == "(no output)"
    log.write_text("Traceback\n  File\nValueError: no room\n\n =====\n   ^^^^\n")
    assert last_line(log) == "ValueError: no room"


# Answers health checks as a file beside it says, until it is killed: what is watched here are processes.
PATIENT = """
import http.server, pathlib, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        sick = pathlib.Path({folder!r}, "sick")
        self.send_response(503 if sick.exists() else 200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def wait_for(said: list[str], text: str, times: int = 1) -> None:
    deadline = time.monotonic() + 60
    while sum(text in line for line in said) < times:
        assert time.monotonic() < deadline, said
        time.sleep(0.05)


def test_the_dead_and_the_hanging_are_restarted_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_opd.rollout.servers.HEALTH_EVERY", 0.1)
    monkeypatch.setattr("megatron_opd.rollout.servers.RESTARTS", 2)
    program = tmp_path / "program.py"
    program.write_text(PATIENT.format(folder=str(tmp_path)))
    python = script(tmp_path / "python", f'exec "{sys.executable}" "{program}" "$@"')
    said: list[str] = []
    before = children()
    servers = Servers(replace(SETTINGS, python=python, count=1), tmp_path / "servers", said.append)
    try:
        servers.start(tmp_path, "0")
        (url,) = servers.urls
        (tmp_path / "sick").touch()
        wait_for(said, "did not answer 3 health checks; restarting")
        (tmp_path / "sick").unlink()
        wait_for(said, "is back")
        assert servers.urls == [url]
        with servers.updating():
            servers.load_from(tmp_path / "newer", "8")
            servers.restart(url)
        wait_for(said, "ended with exit code 143; restarting")
        deadline = time.monotonic() + 60
        while not any(str(tmp_path / "newer") in child.cmdline() for child in psutil.Process().children()):
            assert time.monotonic() < deadline, "restarted with the newest weights"
            time.sleep(0.05)
        loading = servers.starting_from()
        servers.restart(url)  # which it does already
        wait_for(said, "is back", times=2)
        assert loading == {tmp_path / "newer"} and not servers.starting_from()
        servers.restart(url)
        wait_for(said, "given up after 2 restarts")
    finally:
        servers.stop()
    assert children() <= before
