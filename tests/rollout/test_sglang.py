"""SGLangEngine against a real server: what it draws is what the training forward gives."""

from dataclasses import replace

import pytest

from megatron_opd.data.prompts import Prompt
from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.rollout.sampling import Sampling
from tests.gloo_pool import GlooPools
from tests.rollout.models import (
    PROMPTS,
    assert_cut_as_training,
    generate,
    generate_cut_as_training,
    training_logprobs,
)
from tests.sglang_server import SGLangServer

SAMPLING = Sampling(max_new_tokens=12, seed=7)


def test_logprobs_are_the_training_forwards(gloo: GlooPools, sglang: SGLangServer) -> None:
    with sglang.engine() as engine:
        rollouts = engine.generate(PROMPTS, replace(SAMPLING, n=2), 0)
    assert [(each.prompt_id, each.sample) for each in rollouts] == [
        (prompt.id, sample) for prompt in PROMPTS for sample in range(2)
    ]
    expected = gloo(1, training_logprobs, sglang.models[0], rollouts, "fp32")[0]
    for rollout, logprobs in zip(rollouts, expected, strict=True):
        assert len(rollout.response_ids) == 12 and rollout.finish_reason == "length"
        assert rollout.logprobs == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_greedy_and_scaled_logprobs_are_the_local_engines(
    gloo: GlooPools, sglang: SGLangServer, temperature: float
) -> None:
    """The two engines have different noise: only greedy responses are the same."""
    sampling = replace(SAMPLING, temperature=temperature, max_new_tokens=1 if temperature else 12)
    local = gloo(1, generate, sglang.models[0], replace(sampling, n=40 if temperature else 1))[0]
    with sglang.engine() as engine:
        served = engine.generate(PROMPTS, replace(sampling, n=8 if temperature else 1), 0)
    if temperature == 0:
        assert [each.response_ids for each in served] == [each.response_ids for each in local]
        for ours, theirs in zip(served, local, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        return
    known = {(each.prompt_id, each.response_ids[0]): each.logprobs[0] for each in local}
    both = [
        (each.logprobs[0], known[each.prompt_id, each.response_ids[0]])
        for each in served
        if (each.prompt_id, each.response_ids[0]) in known
    ]
    assert len(both) > 5, "likely tokens are drawn by both"
    assert [ours for ours, _ in both] == pytest.approx([theirs for _, theirs in both], abs=1e-4)


@pytest.mark.parametrize(
    "cut", [{"top_p": 0.8}, {"top_k": 12}, {"top_k": 20, "top_p": 0.6}, {"top_k": 1}], ids=str
)
def test_both_engines_keep_what_the_training_softmax_says(
    gloo: GlooPools, sglang: SGLangServer, cut: dict[str, float]
) -> None:
    sampling = replace(SAMPLING, **cut, temperature=1.0 if "top_k" in cut else 1.3, keep_ids=True)  # type: ignore[arg-type]
    with sglang.engine() as engine:
        rollouts = engine.generate(PROMPTS, sampling, 0)
    gloo(1, assert_cut_as_training, sglang.models[0], sampling, rollouts, 1e-4)
    gloo(1, generate_cut_as_training, sglang.models[0], sampling, ParallelLayout())
    sizes = {len(row) for rollout in rollouts for row in rollout.kept_ids.lists()}
    assert len(sizes) == 1 if set(cut) == {"top_k"} else len(sizes) > 2
    assert max(sizes) <= cut.get("top_k", 249)


def test_a_seed_fixes_a_response_whatever_else_is_asked(sglang: SGLangServer) -> None:
    same_text = [Prompt(name, PROMPTS[0].token_ids, "") for name in ("a", "b")]
    with sglang.engine() as engine:
        together = engine.generate(same_text, replace(SAMPLING, n=2), 0)
        alone = engine.generate(same_text[1:], SAMPLING, 0)
        other_seed = engine.generate(same_text[1:], replace(SAMPLING, seed=8), 0)
    assert alone[0].response_ids == together[2].response_ids
    assert len({tuple(each.response_ids) for each in (*together, *other_seed)}) == 5


def test_stops_at_the_first_stop_token(sglang: SGLangServer) -> None:
    with sglang.engine() as engine:
        free = engine.generate(PROMPTS, SAMPLING, 0)
        stops = (2, free[0].response_ids[3])  # 2 is in the model's generation_config.json
        stopped = engine.generate(PROMPTS, replace(SAMPLING, stop_ids=stops), 0)
    for whole, cut in zip(free, stopped, strict=True):
        ends = [position for position, token in enumerate(whole.response_ids) if token in stops]
        assert cut.response_ids == whole.response_ids[: ends[0] + 1 if ends else 12]
        assert cut.finish_reason == ("stop" if ends else "length")
    assert {each.finish_reason for each in stopped} == {"stop", "length"}


def test_the_whole_context_can_be_used(sglang: SGLangServer) -> None:
    prompt = Prompt("long", [5 + i % 40 for i in range(84)], "")
    with sglang.engine() as engine:
        (rollout,) = engine.generate([prompt], SAMPLING, 0)
    assert len(rollout.prompt_ids) + len(rollout.response_ids) == 96


def test_no_prompts_no_rollouts(sglang: SGLangServer) -> None:
    with sglang.engine() as engine:
        assert engine.generate([], SAMPLING, 0) == []


def test_an_id_that_the_model_lacks_is_never_sent(sglang: SGLangServer) -> None:
    with sglang.engine() as engine, pytest.raises(AssertionError, match="kills the server"):
        engine.generate([Prompt("0", [3, 250], "")], SAMPLING, 0)
    assert sglang.servers.urls
