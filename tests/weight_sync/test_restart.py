"""Servers of the run itself that are killed between pushes: whoever draws has the newest weights, or none is asked."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.rollout.sampling import Sampling
from megatron_opd.rollout.servers import Servers
from megatron_opd.rollout.sglang import SGLangEngine
from megatron_opd.training.serving import drawn
from megatron_opd.weight_sync import transport as transports
from megatron_opd.weight_sync.distributed import DistributedTransport
from megatron_opd.weight_sync.sync import WeightSync
from megatron_opd.weight_sync.transport import Ask, Outgoing, Transport, Trouble
from tests.gloo_pool import GlooPools
from tests.rollout.models import PROMPTS, full_logits, load
from tests.sglang_server import sglang_python, tiny_settings
from tests.tiny import save_tiny_model

SAMPLING = Sampling(max_new_tokens=12, seed=7)
START_TIMEOUT = 400.0


class Killing:
    """Broadcasts, and once kills a server between two buckets."""

    def __init__(self) -> None:
        self._transport = DistributedTransport(torch.device("cpu"))
        self.kill: Callable[[], None] | None = None

    def send(self, weights: Outgoing, ask: Ask, urls: Sequence[str]) -> dict[str, Trouble]:
        buckets = 0

        def asking(path: str, bodies: Mapping[str, Any]) -> dict[str, Any]:
            nonlocal buckets
            buckets += path == "/update_weights_from_distributed"
            if self.kill is not None and buckets == 2:
                self.kill()
                self.kill = None
            return ask(path, bodies)

        return self._transport.send(weights, asking, urls)


def start(
    model: Path, folder: Path, python: Path, transport: Transport, said: list[str]
) -> tuple[Any, Any, Servers, WeightSync]:
    """The model, an engine, and a sync that starts two servers at its first push."""
    chunks, arch, groups = load(model, ParallelLayout())
    engine = SGLangEngine(arch.vocab_size, groups.mp)
    servers = Servers(tiny_settings(python, start_timeout=START_TIMEOUT, count=2), folder, said.append)
    sync = WeightSync(
        engine,
        transport,
        arch,
        groups,
        source=model,
        folder=folder / "weights",
        servers=servers,
        urls=[],
        api_key=None,
        options={"outage_timeout": START_TIMEOUT},
        say=said.append,
    )
    return chunks, engine, servers, sync


def kill(servers: Servers, index: int) -> None:
    """Kill a server as the system does when memory runs out."""
    guard = servers._servers[index].process
    assert guard is not None
    (first,) = psutil.Process(guard.pid).children()
    first.kill()
    first.wait()


def lose_servers(model: Path, folder: Path, python: Path) -> dict[str, Any]:
    said: list[str] = []
    transport = Killing()
    chunks, engine, servers, sync = start(model, folder, python, transport, said)
    pushed = []

    def publish(version: int) -> float:
        sync.push(chunks, version)
        pushed.append(version)
        return 0.0

    def versions() -> list[Any]:
        answers = engine.ask_all("/model_info").values()
        return [answer.get("weight_version") if isinstance(answer, dict) else None for answer in answers]

    bucket_bytes, transports.BUCKET_BYTES = transports.BUCKET_BYTES, 100_000
    try:
        publish(0)
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.mul_(1.1)
        publish(1)
        both = versions()
        transport.kill = functools.partial(kill, servers, 0)
        publish(2)
        one = versions()
        first = drawn(lambda: engine.generate(PROMPTS, SAMPLING, 2), publish, 2)
        kill(servers, 1)
        second = drawn(lambda: engine.generate(PROMPTS, SAMPLING, 2), publish, 2)
        tokens = second[0].prompt_ids + second[0].response_ids
        logprobs = full_logits(chunks[0], sync._arch, tokens[:-1]).log_softmax(-1)
        expected = [
            float(logprobs[place, token])
            for place, token in enumerate(tokens[1:])
            if place >= len(second[0].prompt_ids) - 1
        ]
        exports = [path.name for path in (folder / "weights").iterdir()]
        return {
            "both": both,
            "one": one,
            "first": first,
            "second": second,
            "expected": expected,
            "pushed": pushed,
            "exports": exports,
            "said": said,
        }
    finally:
        transports.BUCKET_BYTES = bucket_bytes
        sync.close()


def test_restarted_servers_draw_with_the_newest_weights_only(gloo: GlooPools, tmp_path: Path) -> None:
    python = sglang_python()
    save_tiny_model(tmp_path / "model", tied=True)
    (found,) = gloo(
        1, lose_servers, tmp_path / "model", tmp_path / "servers", python, timeout=2 * START_TIMEOUT
    )
    assert found["both"] == ["1", "1"], "the group spans both servers"
    assert found["one"] == [None, "2"], "the other takes the weights when one dies in the middle"
    assert found["exports"] == ["0"], "the one that servers start with"
    assert any("did not take the weights 2" in line for line in found["said"])
    first, second = found["first"], found["second"]
    assert found["pushed"] == [0, 1, 2, 2], "given again to servers that start with the first export"
    assert {rollout.weight_version for rollout in first + second} == {2}
    assert [each.response_ids for each in first] == [each.response_ids for each in second]
    assert second[0].logprobs == pytest.approx(found["expected"], abs=1e-4)
