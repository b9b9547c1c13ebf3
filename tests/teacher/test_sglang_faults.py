"""Teacher servers that die, answer nonsense or serve another model: another is asked, or one clear error ends it."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opd.data.packing import pack
from megatron_opd.errors import Outage, UserError
from megatron_opd.models.architecture import ServedModel, read_served
from megatron_opd.parallel.groups import ParallelLayout, build_groups
from megatron_opd.rollout.replicas import BadReply
from megatron_opd.teacher.contract import Ask, check_contract
from megatron_opd.teacher.payload import tensors_of
from megatron_opd.teacher.sglang import SGLangTeacher
from megatron_opd.teacher.teacher import Asked
from tests.gloo_pool import GlooPools
from tests.rollout.fake_server import fake_server
from tests.sglang_server import LONGEST, SGLangServer
from tests.tiny import VOCAB, recorded_rollouts


def nobody() -> str:
    """The URL of a port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def scored(urls: list[str], layout: ParallelLayout, **options: Any) -> list[list[float]] | str:
    """This rank's log-probs of each microbatch, or the error."""
    groups = build_groups(layout)
    packed = pack(recorded_rollouts(6), dp_size=layout.data, token_budget=96)[groups.dp.rank()]
    teacher = SGLangTeacher(groups, vocab_size=VOCAB)
    if teacher.asks:
        teacher.connect(urls, key="teacher.sglang", **{"outage_timeout": 120.0, **options})
    try:
        return [
            tensors_of(payload)[0].tolist() for payload in teacher.score(Asked(packed)) if payload is not None
        ]
    except UserError as error:
        return str(error)
    finally:
        teacher.close()


@pytest.mark.parametrize("body", [b"<html>", b'{"meta_info": {"prompt_tokens": 3}}'])
def test_nonsense_and_dead_servers_are_passed_over(
    gloo: GlooPools, sglang: SGLangServer, body: bytes
) -> None:
    (expected,) = gloo(1, scored, [sglang.url], ParallelLayout())
    with fake_server(body) as (url, asked):
        (found,) = gloo(1, scored, [url, nobody(), sglang.url], ParallelLayout())
    assert "/generate" in asked
    assert [torch.tensor(one) for one in found] == [pytest.approx(torch.tensor(one)) for one in expected]


@pytest.mark.parametrize("layout", [ParallelLayout(data=2), ParallelLayout(pipeline=2)], ids=str)
def test_dead_servers_are_the_same_error_on_every_rank(gloo: GlooPools, layout: ParallelLayout) -> None:
    url = nobody()
    for found in gloo(2, scored, [url], layout, outage_timeout=1.0):
        assert isinstance(found, str)
        assert found.startswith("teacher.sglang: none of 1 servers has worked for 1 s") and url in found


def test_too_few_logprobs_again_and_again_are_an_error_that_says_so(gloo: GlooPools) -> None:
    tokens = len(recorded_rollouts(1)[0].prompt_ids) + len(recorded_rollouts(1)[0].response_ids)
    body = {"meta_info": {"prompt_tokens": tokens, "input_token_logprobs": [[None, 3, None]]}}
    with fake_server(json.dumps(body).encode()) as (url, _):
        (found,) = gloo(1, scored_one, [url])
    assert found.startswith("teacher.sglang: 5 attempts of one request failed")
    assert f"at {url}: 1 log-probs for " in found


def scored_one(urls: list[str]) -> str:
    """The error of scoring one rollout."""
    teacher = SGLangTeacher(build_groups(ParallelLayout()), vocab_size=VOCAB)
    teacher.connect(urls, key="teacher.sglang", outage_timeout=60.0)
    with pytest.raises(UserError) as caught:
        teacher.score(Asked(pack(recorded_rollouts(1), dp_size=1, token_budget=96)[0]))
    teacher.close()
    return str(caught.value)


@pytest.fixture
def ask(sglang: SGLangServer) -> Iterator[Ask]:
    """What asks the real server."""
    with sglang.engine(key="teacher.sglang") as engine:
        yield engine.ask_all


def test_the_contract_holds_for_the_served_model(ask: Ask, sglang: SGLangServer) -> None:
    check_contract(ask, read_served(sglang.models[0]), LONGEST)


@pytest.mark.parametrize(
    ("model", "longest", "message"),
    [
        (
            ServedModel(VOCAB, 128, ("LlamaForCausalLM",)),
            LONGEST,
            "serves Qwen3ForCausalLM, but teacher.path",
        ),
        (
            ServedModel(VOCAB - 2, 128, ()),
            LONGEST,
            f"serves .* with {VOCAB} tokens, but teacher.path has {VOCAB - 2}",
        ),
        (ServedModel(VOCAB, 128, ()), 4096, r"takes \d+ tokens, but .* up to 4096: start it with"),
    ],
)
def test_another_model_is_refused(
    ask: Ask, sglang: SGLangServer, model: ServedModel, longest: int, message: str
) -> None:
    with pytest.raises(UserError, match=f"^teacher.sglang: {sglang.url} {message}"):
        check_contract(ask, model, longest)


def test_a_smaller_vocabulary_is_refused_by_the_server_itself(ask: Ask) -> None:
    """As where the trainer does not see the server's model files."""

    def elsewhere(path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        answers = ask(path, body)
        for answer in answers.values():
            if isinstance(answer, dict) and "model_path" in answer:
                answer["model_path"] = "org/model"
        return answers

    with pytest.raises(UserError, match="out-of-vocabulary token id 299"):
        check_contract(elsewhere, ServedModel(300, 128, ()), LONGEST)


def test_a_server_that_says_nothing() -> None:
    def ask(path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        return {"http://a:1": BadReply("no route")}

    with pytest.raises(Outage, match="no server says what it serves; http://a:1: no route"):
        check_contract(ask, ServedModel(VOCAB, 128, ()), LONGEST)


def test_an_embedding_model_is_refused() -> None:
    def ask(path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        return {"http://a:1": {"is_generation": False}}

    with pytest.raises(UserError, match="a model that does not generate"):
        check_contract(ask, ServedModel(VOCAB, 128, ()), LONGEST)


def test_sizes_of_a_model_of_any_family(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        '{"text_config": {"vocab_size": 9, "max_position_embeddings": 5}, "architectures": ["X"]}'
    )
    assert read_served(tmp_path) == ServedModel(9, 5, ("X",))
    path.write_text('{"vocab_size": 9}')
    with pytest.raises(UserError, match="max_position_embeddings has to be a whole number above 0, not None"):
        read_served(tmp_path)
