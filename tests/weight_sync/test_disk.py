"""Weights through a folder: after a sync a real server draws with the student's, whatever the student's layout."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_opd.data.rollouts import Rollout
from megatron_opd.errors import UserError
from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.rollout.sampling import Sampling
from megatron_opd.rollout.sglang import SGLangEngine
from megatron_opd.rollout.sharded import generate_sharded
from megatron_opd.weight_sync.checksums import check_servers, exported_checksums
from megatron_opd.weight_sync.disk import DiskSync
from tests.gloo_pool import GlooPools
from tests.rollout.models import PROMPTS, load, training_logprobs
from tests.sglang_server import SGLangServer

SAMPLING = Sampling(max_new_tokens=12, seed=7)


@pytest.fixture
def served(sglang: SGLangServer) -> Iterator[SGLangServer]:
    """The server, with its first weights again afterwards."""
    yield sglang
    sglang.load(sglang.models[0], "0")


def push_and_draw(
    model: Path, layout: ParallelLayout, url: str, folder: Path, versions: tuple[int, ...]
) -> tuple[list[Rollout], list[str]]:
    """Push a model several times, then draw; also the exports that are left, and after the end."""
    chunks, arch, groups = load(model, layout)
    engine = SGLangEngine(arch.vocab_size, groups.mp)
    sync = DiskSync(
        engine,
        arch,
        groups,
        source=model,
        folder=folder,
        servers=None,
        urls=[url],
        api_key=None,
        options={"outage_timeout": 60.0},
        say=print,
    )
    for version in versions:
        sync.push(chunks, version)
    rollouts = generate_sharded(engine, PROMPTS, SAMPLING, weight_version=versions[-1], group=groups.dp_cp)
    exports = sorted(path.name for path in folder.iterdir())
    sync.close()
    return rollouts, exports


@pytest.mark.parametrize("layout", [ParallelLayout(tensor=2), ParallelLayout(data=2)])
def test_the_server_draws_with_what_was_pushed(
    gloo: GlooPools, served: SGLangServer, tmp_path: Path, layout: ParallelLayout
) -> None:
    folder = tmp_path / "weights"
    results = gloo(2, push_and_draw, served.models[1], layout, served.url, folder, (1, 2, 3))
    assert results[0][0] == results[1][0], "every rank has every rollout"
    rollouts, exports = results[0]
    assert exports == ["2", "3"] and not folder.exists()
    assert [each.prompt_id for each in rollouts] == [prompt.id for prompt in PROMPTS]
    expected = gloo(1, training_logprobs, served.models[1], rollouts, "fp32")[0]
    for rollout, logprobs in zip(rollouts, expected, strict=True):
        assert rollout.weight_version == 3
        assert rollout.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_a_folder_that_the_server_cannot_read_is_an_error(
    gloo: GlooPools, served: SGLangServer, tmp_path: Path
) -> None:
    with served.engine() as engine:
        answer = engine.ask_all("/update_weights_from_disk", {"model_path": "/nowhere/at/all"})[served.url]
        assert isinstance(answer, UserError) and "refuses (400)" in str(answer)
        engine.generate(PROMPTS, SAMPLING, 0)


def test_checksums_tell_other_weights_apart(served: SGLangServer) -> None:
    with served.engine() as engine:
        sums = engine.ask_all("/weights_checker", {"action": "checksum"})
    exported = [exported_checksums(model, layers=4) for model in served.models]
    assert len(exported[0]) == 13
    check_servers(sums, exported[0])
    with pytest.raises(
        UserError, match=r"qkv_proj|_proj.weight and \d+ more tensors of .* those of the trainer"
    ):
        check_servers(sums, exported[1])
    (answer,) = sums.values()
    ranks = [{"checksums": {**rank["checksums"], "model.norm.weight": "0"}} for rank in answer["ranks"]]
    with pytest.raises(UserError, match=r"model.norm.weight .* of b differ from those of a"):
        check_servers({"a": answer, "b": {"ranks": ranks}}, None)
