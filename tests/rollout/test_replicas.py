"""Servers that die, that do not go on after a pause, or that strangers meddle with: every response comes once."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from megatron_opd.data.prompts import PromptStream
from megatron_opd.data.rollouts import Rollout
from megatron_opd.errors import UserError
from megatron_opd.parallel.groups import ParallelLayout, build_groups
from megatron_opd.rollout import replicas
from megatron_opd.rollout.sampling import Sampling
from megatron_opd.rollout.servers import Servers
from megatron_opd.rollout.sglang import SGLangEngine
from megatron_opd.rollout.sharded import RolloutsStopped
from megatron_opd.rollout.stream import RolloutStream
from tests.gloo_pool import GlooPools
from tests.rollout import test_sglang_replies as replies
from tests.rollout.fake_server import Reply, between, fake_server, server
from tests.rollout.models import PROMPTS, training_logprobs
from tests.rollout.test_stream import assert_same, while_drawing
from tests.sglang_server import SGLangServer, sglang_python, tiny_settings
from tests.tiny import VOCAB

SAMPLING = Sampling(max_new_tokens=32, seed=7, n=2)
STEPS = 3
ABORTED = b'{"output_ids": [], "meta_info": {"finish_reason": {"type": "abort", "message": "Aborted"}}}'


def abort_all(url: str) -> Callable[[int], None]:
    """What a stranger does who wants nothing to run."""

    def abort(_: int) -> None:
        httpx.post(url + "/abort_request", json={"abort_all": True}, timeout=60).raise_for_status()

    return abort


@pytest.fixture(scope="module")
def expected(sglang: SGLangServer) -> list[Rollout]:
    """What the first weights draw when nobody meddles."""
    with sglang.engine() as engine:
        return engine.generate(PROMPTS, SAMPLING, 0)


@pytest.mark.parametrize("ahead", [True, False])
def test_a_strangers_aborts_cost_no_response(
    sglang: SGLangServer, expected: list[Rollout], ahead: bool
) -> None:
    with sglang.engine(concurrency=4) as engine, ThreadPoolExecutor() as pool:
        drawing = (
            engine.submit(PROMPTS, SAMPLING, 0)
            if ahead
            else pool.submit(engine.generate, PROMPTS, SAMPLING, 0)
        )
        assert while_drawing(drawing, abort_all(sglang.url)) > 1
        rollouts = engine.take(drawing)
    assert_same(rollouts, expected)


def test_aborts_without_end_are_an_error_and_no_storm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "FIRST_REST", 0.02)
    engine = SGLangEngine(VOCAB)
    with fake_server(ABORTED) as (url, asked):
        engine.connect([url], outage_timeout=0.5)
        with pytest.raises(UserError, match=r"aborted whenever it was sent for 0\.5 s, and not by this run"):
            engine.generate(PROMPTS[:1], replace(SAMPLING, n=1), 0)
    engine.close()
    assert 5 < len(asked) < 12


def test_a_run_that_is_to_stop_gives_its_requests_up() -> None:
    """The server never answers."""
    answering = threading.Event()
    engine = SGLangEngine(VOCAB, stopped=answering.is_set)

    def reply(method: str, path: str, sent: bytes) -> Reply:
        if method == "POST":
            answering.set()
            released.wait()
        return 503, b""

    released = threading.Event()
    with server(reply) as (url, asked):
        engine.connect([url])
        with pytest.raises(RolloutsStopped):
            engine.generate(PROMPTS[:1], replace(SAMPLING, n=1), 0)
        engine.close()
        released.set()
    assert asked == ["/generate"]


def test_pauses_of_this_run_may_cut_off_a_request_without_end() -> None:
    engine = SGLangEngine(VOCAB)
    pauses = 0

    def reply(method: str, path: str, sent: bytes) -> Reply:
        nonlocal pauses
        if pauses == 30:
            return 200, json.dumps(replies.REPLY).encode()
        with engine.paused(tell=False):
            pauses += 1
            return 200, ABORTED

    with server(reply) as (url, asked):
        engine.connect([url], outage_timeout=0.01)
        (rollout,) = engine.take(engine.submit([replies.PROMPT], replies.SAMPLING, 5))
        engine.close()
    assert asked == 31 * ["/generate"] and rollout.response_ids == [8, 9, 2]


def test_a_server_that_does_not_go_on_after_a_pause_rests_until_it_does(
    sglang: SGLangServer, expected: list[Rollout]
) -> None:
    refused = 0

    def refuse(path: str) -> Reply | None:
        nonlocal refused
        refused += path == "/continue_generation"
        return (500, b"oops") if path == "/continue_generation" and refused < 3 else None

    with between(sglang.url, refuse) as (url, asked), sglang.engine([url], concurrency=4) as engine:
        drawing = engine.submit(PROMPTS, SAMPLING, 0)
        while not asked:  # the first of them is on its way
            time.sleep(0.001)
        with engine.paused():
            pass
        rollouts = engine.take(drawing)
    assert_same(rollouts, expected)
    afterwards = asked[asked.index("/pause_generation") + 1 :]
    assert afterwards[:5] == 3 * ["/continue_generation"] + ["/health", "/model_info"]
    assert set(afterwards[5:]) == {"/generate"}


def test_servers_that_somebody_has_left_paused_are_woken(sglang: SGLangServer) -> None:
    httpx.post(sglang.url + "/pause_generation", json={"mode": "abort"}, timeout=60).raise_for_status()
    with sglang.engine(request_timeout=30.0, outage_timeout=30.0) as engine:
        engine.wake()
        assert len(engine.generate(PROMPTS, replace(SAMPLING, n=1), 0)) == len(PROMPTS)


@pytest.fixture
def another(sglang: SGLangServer, tmp_path: Path) -> Iterator[Servers]:
    """A second server, with the first weights; the first has these again afterwards."""
    servers = Servers(tiny_settings(sglang_python(), start_timeout=300.0), tmp_path / "servers", print)
    servers.start(sglang.models[0], "0")
    try:
        yield servers
    finally:
        servers.stop()
        sglang.load(sglang.models[0], "0")


def steps_while_one_dies(urls: list[str], models: list[Path], pid: int) -> tuple[list[list[Rollout]], bool]:
    """The rollouts of all steps, of which the last server draws some when its process is killed; whether it failed."""
    groups = build_groups(ParallelLayout(data=2))
    engine = SGLangEngine(VOCAB, groups.mp)
    engine.connect(urls, concurrency=4, outage_timeout=60.0)
    settings = {"prompts_per_step": 3, "max_staleness": 2, "last": STEPS}
    prompts = PromptStream(PROMPTS, seed=3)
    stream = RolloutStream(engine, prompts, SAMPLING, groups.dp_cp, **settings)
    victim = engine._connected.replicas[-1]

    def kill() -> None:
        while not victim.in_flight:
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)  # as the system does when memory runs out

    killer = threading.Thread(target=kill if groups.dp_cp.rank() == 0 else lambda: None)
    taken = []
    try:
        for step in range(1, STEPS + 1):
            if groups.dp_cp.rank() == 0 and step > 1:
                model = {"model_path": str(models[(step - 1) % 2]), "weight_version": str(step - 1)}
                with engine.paused():
                    engine.ask_all("/update_weights_from_disk", {**model, "flush_cache": True})
            groups.dp_cp.barrier().wait()
            if step == 2:
                killer.start()
            taken.append(stream.take(step))
        killer.join()
        return taken, victim.failures > 0
    finally:
        engine.close()


def test_one_of_two_servers_dies_while_they_draw_ahead(
    gloo: GlooPools, sglang: SGLangServer, another: Servers
) -> None:
    urls = [sglang.url, *another.urls]
    guard = another._servers[0].process
    assert guard is not None
    (process,) = psutil.Process(guard.pid).children()
    results = gloo(2, steps_while_one_dies, urls, sglang.models, process.pid, timeout=400)
    taken, felt = results[0]
    assert taken == results[1][0] and felt
    order = [prompt.id for prompt in PromptStream(PROMPTS, seed=3).take(3 * STEPS)]
    drawn = [(each.prompt_id, each.sample) for rollouts in taken for each in rollouts]
    assert drawn == [(name, sample) for name in order for sample in range(2)]
    rollouts = [each for step in taken for each in step]
    by_model = [gloo(1, training_logprobs, model, rollouts, "fp32")[0] for model in sglang.models]
    for row, rollout in enumerate(rollouts):
        assert len(rollout.response_ids) == 32 and rollout.finish_reason == "length"
        versions = rollout.token_versions
        expected = [by_model[version % 2][row][token] for token, version in enumerate(versions)]
        assert rollout.logprobs == pytest.approx(expected, abs=1e-4)
    for step, step_rollouts in enumerate(taken, 1):
        versions = [version for each in step_rollouts for version in each.token_versions]
        assert step - 3 <= min(versions) and max(versions) <= step - 1
