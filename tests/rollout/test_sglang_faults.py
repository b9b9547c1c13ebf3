"""Servers that die, hang or answer nonsense: no sample is lost or doubled, or there is one clear error."""

import re
import signal
import socket
import threading
import time
from dataclasses import replace

import psutil
import pytest

from megatron_opd.data.rollouts import Rollout
from megatron_opd.errors import Outage, UserError
from megatron_opd.rollout.sampling import Sampling
from megatron_opd.rollout.sglang import SGLangEngine
from tests.rollout.fake_server import fake_server
from tests.rollout.models import PROMPTS
from tests.sglang_server import SGLangServer
from tests.tiny import VOCAB

SAMPLING = Sampling(max_new_tokens=12, seed=7)


def nobody() -> str:
    """The URL of a port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def server_tree(sglang: SGLangServer) -> list[psutil.Process]:
    """The server's processes, its HTTP server first."""
    port = sglang.url.rpartition(":")[2]
    for child in psutil.Process().children(recursive=True):
        words = child.cmdline()
        if port in words and "sglang.launch_server" in words and "guard.py" not in " ".join(words):
            return [child, *child.children(recursive=True)]
    raise AssertionError("the server does not run")


def drawn(rollouts: list[Rollout]) -> list[Rollout]:
    """Everything but the log-probs, whose last bits depend on what shares a batch."""
    return [replace(rollout, logprobs=[], drawn_logprobs=[]) for rollout in rollouts]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"<html>busy</html>", 200),
        (b'{"output_ids": [1], "meta_info": {}}', 200),
        (b"oops", 500),
        (b"{", 200),
    ],
)
def test_nonsense_is_asked_of_another_server(sglang: SGLangServer, body: bytes, status: int) -> None:
    with fake_server(body, status) as (url, asked), sglang.engine([url, sglang.url]) as engine:
        rollouts = engine.generate(PROMPTS, SAMPLING, 0)
    assert "/generate" in asked
    with sglang.engine() as engine:
        expected = engine.generate(PROMPTS, SAMPLING, 0)
    assert drawn(rollouts) == drawn(expected)


def test_a_dead_server_is_passed_over(sglang: SGLangServer) -> None:
    with sglang.engine([nobody(), sglang.url]) as engine:
        rollouts = engine.generate(PROMPTS, replace(SAMPLING, n=3), 0)
    assert len({(each.prompt_id, each.sample) for each in rollouts}) == len(rollouts) == 3 * len(PROMPTS)


def test_nothing_but_nonsense_is_an_error_that_says_so() -> None:
    engine = SGLangEngine(VOCAB)
    with fake_server(b'{"output_ids": [1], "meta_info": 3}') as (url, _):
        engine.connect([url], outage_timeout=60.0)
        with pytest.raises(UserError, match=f"5 attempts .* at {url}: the reply has no meta_info"):
            engine.generate(PROMPTS, SAMPLING, 0)
    engine.close()


def test_a_refused_request_is_an_error_at_once() -> None:
    engine = SGLangEngine(VOCAB)
    with fake_server(b'{"error": {"message": "too long"}}', 400) as (url, asked):
        engine.connect([url])
        with pytest.raises(UserError, match=r"/generate refuses \(400\): too long"):
            engine.generate(PROMPTS[:1], SAMPLING, 0)
    assert asked == ["/generate"]
    engine.close()


def test_old_weights_are_not_used() -> None:
    engine = SGLangEngine(VOCAB)
    with fake_server(b"{}", version="3") as (url, _):
        engine.connect([url], outage_timeout=1.0)
        with pytest.raises(UserError, match=r"none of 1 servers .* has the weights '3' instead of '4'"):
            engine.generate(PROMPTS, SAMPLING, 4)
    engine.close()


def test_all_servers_dead_is_an_error_in_time() -> None:
    urls = [nobody(), nobody()]
    engine = SGLangEngine(VOCAB)
    engine.connect(urls, outage_timeout=1.0)
    with pytest.raises(Outage, match="none of 2 servers has worked for 1 s") as caught:
        engine.generate(PROMPTS, SAMPLING, 0)
    assert all(re.escape(url) in re.escape(str(caught.value)) for url in urls)
    engine.close()


def test_a_hanging_server_is_given_up_and_used_again_when_it_is_back(sglang: SGLangServer) -> None:
    tree = server_tree(sglang)
    with sglang.engine(request_timeout=1.0, outage_timeout=2.0) as engine:
        for process in tree:
            process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(UserError, match="none of 1 servers has worked for 2 s"):
                engine.generate(PROMPTS, SAMPLING, 0)
        finally:
            for process in tree:
                process.send_signal(signal.SIGCONT)
    with sglang.engine() as engine:
        assert len(engine.generate(PROMPTS, SAMPLING, 0)) == len(PROMPTS)


def test_a_server_killed_mid_generation_is_restarted_and_every_sample_drawn_once(
    sglang: SGLangServer,
) -> None:
    sampling = replace(SAMPLING, n=4, max_new_tokens=64)
    with sglang.engine() as engine:
        expected = engine.generate(PROMPTS, sampling, 0)
    first = server_tree(sglang)[0]
    with sglang.engine(concurrency=4, outage_timeout=300.0) as engine:
        assert engine._servers is not None
        (replica,) = engine._servers.replicas

        def kill() -> None:
            while replica.in_flight < 4:
                time.sleep(0.001)
            first.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        rollouts = engine.generate(PROMPTS, sampling, 0)
        killer.join()
    assert drawn(rollouts) == drawn(expected)
    assert any("restarting" in line for line in sglang.said)
    assert server_tree(sglang)[0].pid != first.pid
