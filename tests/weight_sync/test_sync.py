"""Weights by every transport: after a push a real server draws with the student's, whatever the student's layout."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opd.data.rollouts import Rollout
from megatron_opd.errors import Outage, UserError
from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.rollout.replicas import BadReply
from megatron_opd.rollout.sampling import Sampling
from megatron_opd.rollout.sglang import SGLangEngine
from megatron_opd.rollout.sharded import gathered, generate_sharded, share
from megatron_opd.weight_sync import transport as transports
from megatron_opd.weight_sync.checksums import SampleChecksums, check_servers
from megatron_opd.weight_sync.disk import DiskTransport
from megatron_opd.weight_sync.distributed import DistributedTransport, own_address
from megatron_opd.weight_sync.sync import WeightSync
from megatron_opd.weight_sync.tensor import TensorTransport
from megatron_opd.weight_sync.transport import Ask, Outgoing, Transport, Trouble
from tests.gloo_pool import GlooPools
from tests.rollout.models import PROMPTS, load, training_logprobs
from tests.sglang_server import SGLangServer

SAMPLING = Sampling(max_new_tokens=12, seed=7)
GREEDY = Sampling(max_new_tokens=12, seed=7, top_k=1)

Make = Callable[[Path], Transport]


def tensor(folder: Path) -> Transport:
    return TensorTransport()


def distributed(folder: Path) -> Transport:
    return DistributedTransport(torch.device("cpu"))


class Forgetful:
    """Says that the servers have the weights, but sends nothing."""

    def __init__(self, folder: Path) -> None:
        pass

    def send(self, weights: Outgoing, ask: Ask, urls: Sequence[str]) -> dict[str, Trouble]:
        for _ in weights.buckets():
            pass
        return {}


class CutShort:
    """The same as another transport, but its first pushes end after the first bucket."""

    def __init__(self, transport: Transport, times: int) -> None:
        self._transport, self._left = transport, times

    def send(self, weights: Outgoing, ask: Ask, urls: Sequence[str]) -> dict[str, Trouble]:
        buckets = 0

        def cut(path: str, bodies: Mapping[str, Any]) -> dict[str, Any]:
            nonlocal buckets
            buckets += path.startswith("/update_weights_from_")
            if self._left and buckets == 2:
                self._left, buckets = self._left - 1, 3
                return {url: BadReply("cut") for url in bodies}
            return ask(path, bodies)

        return self._transport.send(weights, cut, urls)


@pytest.fixture
def served(sglang: SGLangServer) -> Iterator[SGLangServer]:
    """The server, with its first weights again afterwards."""
    yield sglang
    sglang.load(sglang.models[0], "0")


def connected(
    model: Path, layout: ParallelLayout, urls: list[str], folder: Path, make: Make, **options: Any
) -> tuple[Any, Any, SGLangEngine, WeightSync]:
    """Model and groups, an engine, and a sync with servers that run already."""
    chunks, arch, groups = load(model, layout)
    engine = SGLangEngine(arch.vocab_size, groups.mp)
    sync = WeightSync(
        engine,
        make(folder),
        arch,
        groups,
        source=model,
        folder=folder,
        servers=None,
        urls=urls,
        api_key=None,
        options=options,
        say=print,
    )
    return chunks, groups, engine, sync


def push_and_draw(
    model: Path,
    layout: ParallelLayout,
    urls: list[str],
    folder: Path,
    make: Make,
    versions: tuple[int, ...],
    sampling: Sampling = SAMPLING,
    *,
    outage_timeout: float = 60.0,
) -> tuple[list[Rollout], list[str]]:
    """Push a model several times in small buckets, then draw; also what is left of exports."""
    chunks, groups, engine, sync = connected(model, layout, urls, folder, make, outage_timeout=outage_timeout)
    bucket_bytes, transports.BUCKET_BYTES = transports.BUCKET_BYTES, 100_000
    try:
        for version in versions:
            sync.push(chunks, version)
        rollouts = generate_sharded(
            engine, PROMPTS, sampling, weight_version=versions[-1], group=groups.dp_cp
        )
        return rollouts, sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    finally:
        transports.BUCKET_BYTES = bucket_bytes
        sync.close()


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (DiskTransport, ParallelLayout(data=2)),
        (tensor, ParallelLayout(tensor=2)),
        (distributed, ParallelLayout(pipeline=2)),
        pytest.param(DiskTransport, ParallelLayout(tensor=2), marks=pytest.mark.full),
        pytest.param(tensor, ParallelLayout(data=2), marks=pytest.mark.full),
        pytest.param(distributed, ParallelLayout(tensor=2), marks=pytest.mark.full),
    ],
)
def test_the_server_draws_with_what_was_pushed(
    gloo: GlooPools, served: SGLangServer, tmp_path: Path, make: Make, layout: ParallelLayout
) -> None:
    folder = tmp_path / "weights"
    results = gloo(2, push_and_draw, served.models[1], layout, [served.url], folder, make, (1, 2, 3))
    assert results[0][0] == results[1][0], "every rank has every rollout"
    rollouts, exports = results[0]
    assert exports == (["2", "3"] if make is DiskTransport else []) and not folder.exists()
    assert [each.prompt_id for each in rollouts] == [prompt.id for prompt in PROMPTS]
    expected = gloo(1, training_logprobs, served.models[1], rollouts, "fp32")[0]
    for rollout, logprobs in zip(rollouts, expected, strict=True):
        assert rollout.weight_version == 3
        assert rollout.logprobs == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("make", [tensor, distributed])
def test_greedy_responses_are_those_of_the_folder_itself(
    gloo: GlooPools, served: SGLangServer, tmp_path: Path, make: Make
) -> None:
    served.load(served.models[1], "4")
    with served.engine() as engine:
        expected = engine.generate(PROMPTS, GREEDY, 4)
        served.load(served.models[0], "0")
        before = engine.generate(PROMPTS, GREEDY, 0)  # the cache has these prompts now
    arguments = (served.models[1], ParallelLayout(), [served.url], tmp_path / "weights", make, (4,), GREEDY)
    rollouts, _ = gloo(1, push_and_draw, *arguments)[0]
    assert [each.response_ids for each in rollouts] == [each.response_ids for each in expected]
    assert [each.response_ids for each in rollouts] != [each.response_ids for each in before]


def push_while_drawing(
    model: Path, url: str, folder: Path, make: Make
) -> tuple[list[Rollout], dict[str, Any]]:
    """Version 2 goes to a server that is drawing with version 1."""
    options = {"outage_timeout": 60.0, "concurrency": 8}
    chunks, groups, engine, sync = connected(model, ParallelLayout(data=2), [url], folder, make, **options)
    engine.connect([url], **options)
    sampling = replace(SAMPLING, max_new_tokens=80, n=3)
    drawing = engine.submit(share(PROMPTS, groups.dp_cp), sampling, 1)
    assert engine._servers is not None
    while not engine._servers.replicas[0].in_flight:
        time.sleep(0.001)
    sync._syncs, sync._urls = 1, [url]  # not the first push, which would connect anew
    try:
        sync.push(chunks, 2)
        rollouts = gathered(lambda: engine.take(drawing), groups.dp_cp)
        return rollouts, engine.ask_all("/model_info")
    finally:
        sync.close()


@pytest.mark.parametrize("make", [DiskTransport, tensor, distributed])
def test_responses_that_a_push_cuts_off_go_on_with_the_new_weights(
    gloo: GlooPools, served: SGLangServer, tmp_path: Path, make: Make
) -> None:
    served.load(served.models[0], "1")
    arguments = (served.models[1], served.url, tmp_path / "weights", make)
    (rollouts, infos), (others, _) = gloo(2, push_while_drawing, *arguments)
    assert rollouts == others and infos[served.url]["weight_version"] == "2"
    by_model = [gloo(1, training_logprobs, model, rollouts, "fp32")[0] for model in served.models]
    assert {version for each in rollouts for version in each.token_versions} <= {1, 2}
    assert any(each.token_versions[-1] == 2 for each in rollouts)
    for row, rollout in enumerate(rollouts):
        expected = [by_model[version - 1][row][token] for token, version in enumerate(rollout.token_versions)]
        assert rollout.logprobs == pytest.approx(expected, abs=1e-4)


def push_cut_short(
    model: Path, url: str, folder: Path, make: Make, times: int, outage_timeout: float
) -> None:
    """Push version 5 by a transport that breaks off `times` times."""

    def cut(folder: Path) -> Transport:
        return CutShort(make(folder), times)

    push_and_draw(model, ParallelLayout(), [url], folder, cut, (5,), outage_timeout=outage_timeout)


def version_and_sums(served: SGLangServer) -> tuple[str, dict[str, Any]]:
    with served.engine() as engine:
        version = engine.ask_all("/model_info")[served.url]["weight_version"]
        return version, engine.ask_all("/weights_checker", {"action": "checksum"})


def checksums(model: Path) -> dict[str, str]:
    sample = SampleChecksums(layers=4)
    sample.add_folder(model)
    return sample.sums()


@pytest.mark.parametrize("make", [tensor, distributed])
def test_an_update_that_is_cut_short_is_begun_again(
    gloo: GlooPools, served: SGLangServer, tmp_path: Path, make: Make
) -> None:
    gloo(1, push_cut_short, served.models[1], served.url, tmp_path / "weights", make, 1, 60.0)
    version, sums = version_and_sums(served)
    assert version == "5"
    check_servers(sums, checksums(served.models[1]))


def test_mixed_weights_have_no_version(gloo: GlooPools, served: SGLangServer, tmp_path: Path) -> None:
    with pytest.raises(Outage, match=r"no server takes the weights 5; http.*: cut"):
        gloo(1, push_cut_short, served.models[1], served.url, tmp_path / "weights", tensor, 99, 3.0)
    version, sums = version_and_sums(served)
    assert version == "5, incomplete"
    for model in served.models:
        with pytest.raises(UserError, match="differ from those of the trainer"):
            check_servers(sums, checksums(model))


def test_an_update_that_nobody_ended_does_not_block_the_next(
    gloo: GlooPools, served: SGLangServer, tmp_path: Path
) -> None:
    with served.engine() as engine:
        assert engine.ask_all("/begin_weight_update", {"selector": "all"})[served.url]["success"]
    arguments = (served.models[1], ParallelLayout(), [served.url], tmp_path / "weights", tensor, (7,))
    rollouts, _ = gloo(1, push_and_draw, *arguments)[0]
    assert {rollout.weight_version for rollout in rollouts} == {7}


def test_weights_that_did_not_arrive_are_found_out(
    gloo: GlooPools, served: SGLangServer, tmp_path: Path
) -> None:
    arguments = (served.models[1], ParallelLayout(data=2), [served.url], tmp_path / "weights", Forgetful)
    with pytest.raises(UserError, match=r"after the weight sync .* differ from those of the trainer"):
        gloo(2, push_and_draw, *arguments, (6,))
    assert version_and_sums(served)[0] == "6, incomplete"


def test_a_folder_that_the_server_cannot_read_is_an_error(served: SGLangServer) -> None:
    with served.engine() as engine:
        answer = engine.ask_all("/update_weights_from_disk", {"model_path": "/nowhere/at/all"})[served.url]
        assert isinstance(answer, UserError) and "refuses (400)" in str(answer)
        engine.generate(PROMPTS, SAMPLING, 0)


def test_checksums_tell_other_weights_apart(served: SGLangServer) -> None:
    with served.engine() as engine:
        sums = engine.ask_all("/weights_checker", {"action": "checksum"})
    sent = [checksums(model) for model in served.models]
    assert len(sent[0]) == 13
    check_servers(sums, sent[0])
    with pytest.raises(
        UserError, match=r"qkv_proj|_proj.weight and \d+ more tensors of .* those of the trainer"
    ):
        check_servers(sums, sent[1])
    (answer,) = sums.values()
    ranks = [{"checksums": {**rank["checksums"], "model.norm.weight": "0"}} for rank in answer["ranks"]]
    with pytest.raises(UserError, match=r"model.norm.weight .* of b differ from those of a"):
        check_servers({"a": answer, "b": {"ranks": ranks}}, None)


def test_servers_here_are_met_at_the_loopback_address() -> None:
    assert own_address(["http://127.0.0.1:3000", "http://localhost:3001"]) == "127.0.0.1"
