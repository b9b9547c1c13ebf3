"""The GPUs of started servers in their environment and command, and ports that stay theirs."""

import errno
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_opd.rollout.server_start import ServerSettings, hold_port, server_command, server_environment

SETTINGS = ServerSettings(
    python=Path(sys.executable), count=2, dtype="bfloat16", longest=64, concurrency=4, start_timeout=60.0
)
FOUR = replace(SETTINGS, gpus=(4, 5, 6, 7))


def visible(settings: ServerSettings, **parent: str) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each server."""
    places = range(settings.count)
    return [server_environment(settings, at, at, parent).get("CUDA_VISIBLE_DEVICES") for at in places]


def test_gpus_are_dealt_evenly_and_in_order() -> None:
    assert visible(FOUR) == ["4,5", "6,7"]
    assert visible(replace(FOUR, count=4)) == ["4", "5", "6", "7"]
    assert visible(replace(FOUR, count=1, gpus=(3, 1))) == ["3,1"]


def test_gpus_count_those_that_the_run_sees() -> None:
    assert visible(replace(SETTINGS, gpus=(2, 0)), CUDA_VISIBLE_DEVICES="7, GPU-5e, 1") == ["1", "7"]


def test_without_gpus_servers_see_what_the_run_sees() -> None:
    assert visible(SETTINGS) == [None, None]
    assert visible(SETTINGS, CUDA_VISIBLE_DEVICES="2,3") == ["2,3", "2,3"]


@pytest.mark.parametrize(
    ("gpus", "arguments", "expected"),
    [
        ((), (), []),
        ((4, 5), (), []),
        ((4, 5, 6, 7), (), ["--tp-size", "2"]),
        ((4, 5, 6, 7), ("--dp-size", "2"), ["--dp-size", "2"]),
        ((4, 5, 6, 7), ("--tp=1",), ["--tp=1"]),
    ],
)
def test_a_server_spreads_the_model_over_its_gpus_unless_it_is_told_how(
    gpus: tuple[int, ...], arguments: tuple[str, ...], expected: list[str]
) -> None:
    settings = replace(SETTINGS, gpus=gpus, arguments=arguments)
    command = server_command(settings, Path("/m"), "0", 1, None)
    found = [at for at, word in enumerate(command) if word.startswith(("--tp", "--dp-"))]
    assert [word for at in found for word in command[at : at + len(expected or [0])]] == expected


def test_a_held_port_is_given_to_nobody_but_the_server() -> None:
    held, port = hold_port("127.0.0.1")
    with held:
        assert hold_again(port, reuse=False) == errno.EADDRINUSE
        assert hold_again(port, reuse=True) == 0  # as SGLang's server does
        others = [hold_port("127.0.0.1") for _ in range(200)]
        assert port not in {other for _, other in others}
        for socket_, _ in others:
            socket_.close()
    assert hold_again(port, reuse=False) == 0


def hold_again(port: int, *, reuse: bool) -> int:
    """The errno of listening at the port."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))
        try:
            server.bind(("127.0.0.1", port))
            server.listen()
        except OSError as error:
            return error.errno or -1
    return 0
