"""Rollouts drawn ahead by a real server: within their staleness, whole, and each token known with its weights."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from megatron_opd.data.prompts import Prompt, PromptStream
from megatron_opd.data.rollouts import Rollout
from megatron_opd.errors import Outage, UserError
from megatron_opd.parallel.groups import ParallelLayout, build_groups
from megatron_opd.rollout import replicas
from megatron_opd.rollout.sampling import Sampling
from megatron_opd.rollout.sglang import Drawing, SGLangEngine
from megatron_opd.rollout.stream import RolloutStream, staleness
from megatron_opd.training.serving import drawn
from tests.gloo_pool import GlooPools
from tests.rollout.models import PROMPTS, training_logprobs
from tests.rollout.test_sglang_faults import nobody
from tests.sglang_server import SGLangServer
from tests.tiny import VOCAB

SAMPLING = Sampling(max_new_tokens=80, seed=7)
SHORT = replace(SAMPLING, max_new_tokens=12, n=2)
STEPS = 5


@pytest.fixture
def served(sglang: SGLangServer) -> Iterator[SGLangServer]:
    """The server, with its first weights again afterwards."""
    yield sglang
    sglang.load(sglang.models[0], "0")


def publish(engine: SGLangEngine, model: object, version: int) -> None:
    body = {"model_path": str(model), "weight_version": str(version), "flush_cache": True}
    with engine.paused():
        answers = engine.ask_all("/update_weights_from_disk", body)
    assert all(answer["success"] for answer in answers.values())


def while_drawing(drawing: Drawing, change: Callable[[int], None]) -> int:
    """Call `change` with 1, 2, ... after longer and longer times until everything is drawn; returns the last."""
    assert drawing is not None
    pause, count = 0.05, 0
    while not drawing.done():
        count += 1
        change(count)
        time.sleep(pause)
        pause *= 1.5
    return count


def assert_same(rollouts: list[Rollout], expected: list[Rollout]) -> None:
    """Responses that were cut off and went on are those that were not.

    One may differ: what is prefilled instead of decoded differs by rounding, and under a cut the noise goes by rank, so
    that about 6 in 100,000 tokens of the tiny model are drawn otherwise (none in a million without a cut).
    """
    pairs = list(zip(rollouts, expected, strict=True))
    assert all(ours.prompt_id == theirs.prompt_id and ours.sample == theirs.sample for ours, theirs in pairs)
    same = [ours.response_ids == theirs.response_ids for ours, theirs in pairs]
    assert sum(same) >= len(same) - 1
    for ours, theirs in itertools.compress(pairs, same):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert ours.drawn_logprobs == pytest.approx(theirs.drawn_logprobs, abs=1e-4)
        assert len(ours.kept_ids) == len(theirs.kept_ids)
        assert [set(kept) for kept in ours.kept_ids.lists()] == [
            set(kept) for kept in theirs.kept_ids.lists()
        ]
        assert ours.token_versions == [0] * len(ours.response_ids)


def ids(rollouts: list[Rollout]) -> list[tuple[str, int, list[int]]]:
    return [(each.prompt_id, each.sample, each.response_ids) for each in rollouts]


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9, "keep_ids": True}])
def test_a_pause_changes_no_token(sglang: SGLangServer, cut: dict[str, Any]) -> None:
    sampling = replace(SAMPLING, n=3, **cut)
    with sglang.engine(concurrency=4) as engine:
        expected = engine.generate(PROMPTS, sampling, 0)
        drawing = engine.submit(PROMPTS, sampling, 0)

        def pause(_: int) -> None:
            with engine.paused():
                pass

        assert while_drawing(drawing, pause) > 1
        rollouts = engine.take(drawing)
    assert_same(rollouts, expected)
    assert all(len(each.kept_ids) == (80 if cut else 0) for each in rollouts)


def test_weights_that_change_mid_response(gloo: GlooPools, served: SGLangServer) -> None:
    sampling = replace(SAMPLING, n=2)
    with served.engine() as engine:
        drawing = engine.submit(PROMPTS, sampling, 0)
        last = while_drawing(drawing, lambda version: publish(engine, served.models[version % 2], version))
        rollouts = engine.take(drawing)
    assert [(each.prompt_id, each.sample) for each in rollouts] == [
        (prompt.id, sample) for prompt in PROMPTS for sample in range(2)
    ]
    assert any(each.version_changes for each in rollouts)
    by_model = [gloo(1, training_logprobs, model, rollouts, "fp32")[0] for model in served.models]
    for row, rollout in enumerate(rollouts):
        versions = rollout.token_versions
        assert len(versions) == len(rollout.response_ids) == 80 and rollout.finish_reason == "length"
        assert versions == sorted(versions) and versions[0] >= 0 and versions[-1] <= last
        expected = [by_model[version % 2][row][token] for token, version in enumerate(versions)]
        assert rollout.logprobs == pytest.approx(expected, abs=1e-4)
    mean = staleness(rollouts, last)
    assert 0 < mean["staleness"] <= mean["staleness_max"] <= last


def stream_of_steps(
    url: str, models: list[object], max_staleness: int, start: int = 0
) -> tuple[list[list[Rollout]], list[dict[str, int]]]:
    """The rollouts of the steps after `start`, and where the prompts are after each; version v has models[v]."""
    groups = build_groups(ParallelLayout(data=2))
    engine = SGLangEngine(VOCAB, groups.mp)
    engine.connect([url], concurrency=8, outage_timeout=60.0)
    prompts = PromptStream(PROMPTS, seed=3)
    prompts.take(3 * start)
    stream = RolloutStream(
        engine,
        prompts,
        SHORT,
        groups.dp_cp,
        prompts_per_step=3,
        max_staleness=max_staleness,
        last=STEPS,
    )
    taken, positions = [], []
    for step in range(start + 1, STEPS + 1):
        if groups.dp_cp.rank() == 0:
            publish(engine, models[step - 1], step - 1)
        groups.dp_cp.barrier().wait()
        taken.append(stream.take(step))
        positions.append(prompts.state_dict())
    engine.close()
    return taken, positions


@pytest.mark.parametrize("max_staleness", [1, 2])
def test_ahead_of_the_weights_by_no_more_than_allowed(
    gloo: GlooPools, served: SGLangServer, max_staleness: int
) -> None:
    """All prompts in order, at every step as many as in a synchronous run."""
    models = [served.models[version % 2] for version in range(STEPS)]
    results = gloo(2, stream_of_steps, served.url, models, max_staleness)
    assert results[0] == results[1], "every rank has every rollout"
    taken, positions = results[0]
    order = [prompt.id for prompt in PromptStream(PROMPTS, seed=3).take(3 * STEPS)]
    drawn = [(each.prompt_id, each.sample) for rollouts in taken for each in rollouts]
    assert drawn == [(name, sample) for name in order for sample in range(2)]
    assert [position["position"] for position in positions] == [3, 6, 9, 12, 15]
    lags = [staleness(rollouts, step)["staleness_max"] for step, rollouts in enumerate(taken)]
    assert lags[0] == 0 and max(lags) <= max_staleness
    assert max(lags) > 0, "something was drawn before its turn"


def test_the_same_weights_give_the_same_responses_ahead_or_not(gloo: GlooPools, served: SGLangServer) -> None:
    models = [served.models[0]] * STEPS
    synchronous, ahead, resumed = (
        gloo(2, stream_of_steps, served.url, models, *settings)[0] for settings in [(0,), (2,), (2, 2)]
    )
    assert [ids(rollouts) for rollouts in ahead[0]] == [ids(rollouts) for rollouts in synchronous[0]]
    assert [ids(rollouts) for rollouts in resumed[0]] == [ids(rollouts) for rollouts in ahead[0][2:]]
    assert ahead[1] == synchronous[1] and resumed[1] == ahead[1][2:]
    assert all(
        staleness(rollouts, step)["staleness_max"] == 0 for step, rollouts in enumerate(synchronous[0])
    )


def take_twice(urls: list[str], max_staleness: int) -> tuple[list[Rollout], dict[str, int]]:
    """The rollouts of step 1, taken of a server where nobody is and then of another; where the prompts are then."""
    groups = build_groups(ParallelLayout())
    engine, prompts = SGLangEngine(VOCAB, groups.mp), PromptStream(PROMPTS, seed=3)
    stream = RolloutStream(
        engine, prompts, SHORT, groups.dp_cp, prompts_per_step=3, max_staleness=max_staleness, last=STEPS
    )
    engine.connect(urls[:1], outage_timeout=0.5)
    with pytest.raises(Outage, match="none of 1 servers has worked"):
        stream.take(1)
    assert prompts.state_dict() == {"position": 0}
    engine.connect(urls[1:], outage_timeout=60.0)
    rollouts = stream.take(1)
    engine.close()
    return rollouts, prompts.state_dict()


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_after_an_error_the_same_step_can_be_taken_again(
    gloo: GlooPools, sglang: SGLangServer, max_staleness: int
) -> None:
    rollouts, position = gloo(1, take_twice, [nobody(), sglang.url], max_staleness)[0]
    with sglang.engine() as engine:
        expected = engine.generate(PromptStream(PROMPTS, seed=3).take(3), SHORT, 0)
    assert ids(rollouts) == ids(expected) and position == {"position": 3}


def lose_the_weights(url: str, model: object) -> tuple[list[list[Rollout]], list[int], list[int]]:
    """Three steps, before whose first the server says it has version 0; also what was given again, and positions."""
    groups = build_groups(ParallelLayout(data=2))
    engine = SGLangEngine(VOCAB, groups.mp)
    engine.connect([url], concurrency=8, outage_timeout=60.0)
    prompts = PromptStream(PROMPTS, seed=3)
    settings = {"prompts_per_step": 3, "max_staleness": 2, "last": 6}
    stream = RolloutStream(engine, prompts, SHORT, groups.dp_cp, **settings)
    published, positions = [], []

    def give(version: int) -> float:
        if groups.dp_cp.rank() == 0:
            publish(engine, model, version)
        groups.dp_cp.barrier().wait()
        published.append(version)
        return 0.0

    if groups.dp_cp.rank() == 0:
        lost = {"new_version": "0", "abort_all_requests": False}
        assert engine.ask_all("/update_weight_version", lost)[url]["success"]
    groups.dp_cp.barrier().wait()
    taken = []
    lost_after, replicas.LOST_AFTER = replicas.LOST_AFTER, 0.5
    try:
        for step in (4, 5, 6):
            taken.append(drawn(partial(stream.take, step), give, step - 1))
            positions.append(prompts.state_dict()["position"])
            give(step)
    finally:
        replicas.LOST_AFTER = lost_after
        engine.close()
    return taken, published, positions


def test_what_is_lost_with_the_weights_is_drawn_again_and_nothing_twice(
    gloo: GlooPools, served: SGLangServer
) -> None:
    results = gloo(2, lose_the_weights, served.url, served.models[0])
    assert results[0] == results[1]
    taken, published, positions = results[0]
    assert published == [3, 4, 5, 6], "once more than after every step"
    assert positions == [3, 6, 9]
    order = [prompt.id for prompt in PromptStream(PROMPTS, seed=3).take(9)]
    assert [(each.prompt_id, each.sample) for rollouts in taken for each in rollouts] == [
        (name, sample) for name in order for sample in range(2)
    ]
    for step, rollouts in zip((4, 5, 6), taken, strict=True):
        assert all(3 <= version <= step - 1 for each in rollouts for version in each.token_versions)


def test_weights_that_the_run_has_not_made_are_refused(gloo: GlooPools, served: SGLangServer) -> None:
    served.load(served.models[0], "9")
    with pytest.raises(UserError, match="a server has weights 9, which step 4 cannot have given it"):
        gloo(1, take_of_a_stranger, served.url)


def take_of_a_stranger(url: str) -> None:
    groups = build_groups(ParallelLayout())
    engine = SGLangEngine(VOCAB, groups.mp)
    engine.connect([url], outage_timeout=60.0)
    settings = {"prompts_per_step": 3, "max_staleness": 1, "last": 6}
    stream = RolloutStream(engine, PromptStream(PROMPTS, seed=3), SHORT, groups.dp_cp, **settings)
    try:
        stream.take(4)
    finally:
        engine.close()


def test_responses_given_up_are_drawn_no_longer_and_the_thread_ends(sglang: SGLangServer) -> None:
    threads = set(threading.enumerate())
    prompts = [Prompt(f"{row}", PROMPTS[0].token_ids, "") for row in range(40)]
    with sglang.engine() as engine:
        engine.submit(prompts, SAMPLING, 0)
        assert engine._servers is not None
        (replica,) = engine._servers.replicas
        while not replica.in_flight:
            time.sleep(0.001)
        assert set(threading.enumerate()) > threads
    assert set(threading.enumerate()) == threads
    with sglang.engine() as engine:
        assert len(engine.generate(PROMPTS, SHORT, 0)) == 2 * len(PROMPTS)
