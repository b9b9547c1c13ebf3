"""LocalEngine on several ranks: the same rollouts as on one, on every rank."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.rollout.sampling import Sampling
from tests.checkpoint.models import write_hf
from tests.gloo_pool import GlooPools
from tests.rollout.models import (
    PROMPTS,
    error_of_diverged,
    generate,
    generate_cut_as_training,
    stopped_on_the_last_rank,
)
from tests.rollout.test_local import assert_same

LAYOUTS = [
    ParallelLayout(tensor=2),
    ParallelLayout(tensor=2, sequence_parallel=True),
    ParallelLayout(pipeline=2),
    ParallelLayout(data=2),
    ParallelLayout(tensor=2, pipeline=2),
    ParallelLayout(pipeline=2, data=2),
    ParallelLayout(pipeline=2, virtual_pipeline=2),
    ParallelLayout(tensor=2, pipeline=2, virtual_pipeline=2),
    ParallelLayout(context=2, data=2),  # context-parallel ranks are replicas to the engine
]
SAMPLING = Sampling(max_new_tokens=10, seed=3, n=2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_every_layout_draws_the_same(
    gloo: GlooPools, tmp_path: Path, layout: ParallelLayout, family: str, tied: bool
) -> None:
    folder = write_hf(tmp_path, family, tied=tied)
    expected = gloo(1, generate, folder, SAMPLING)[0]
    stop_ids = tuple(rollout.response_ids[i] for i, rollout in enumerate(expected[:5]))
    for sampling in (SAMPLING, replace(SAMPLING, stop_ids=stop_ids, top_k=20, top_p=0.9, keep_ids=True)):
        expected = gloo(1, generate, folder, sampling)[0]
        results = gloo(layout.world_size, generate, folder, sampling, PROMPTS, layout)
        assert_same(results[0], expected)
        assert all(result == results[0] for result in results)


def test_a_stopped_replica_stops_all(gloo: GlooPools, tmp_path: Path) -> None:
    """One of two replicas of two ranks each: its ranks stop at once, the other's after its responses."""
    folder = write_hf(tmp_path, "qwen3", tied=True)
    layout = ParallelLayout(tensor=2, data=2)
    asked = gloo(4, stopped_on_the_last_rank, folder, SAMPLING, layout)
    assert asked == [SAMPLING.max_new_tokens, 0, 4, 0]


EXPERT_LAYOUTS = [
    ParallelLayout(data=2, expert=2),
    ParallelLayout(tensor=2, sequence_parallel=True),
    ParallelLayout(tensor=2, sequence_parallel=True, data=2, expert=4),
    ParallelLayout(pipeline=2, data=2, expert=2),
    ParallelLayout(pipeline=2, data=2, expert=2, virtual_pipeline=2),
    ParallelLayout(context=2, expert=2),
]


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS, ids=str)
def test_experts_on_other_ranks_draw_the_same(
    gloo: GlooPools, tmp_path: Path, layout: ParallelLayout
) -> None:
    """Also with one prompt for two replicas: the one without takes part in fetching the experts."""
    folder = write_hf(tmp_path, "qwen3_moe", tied=False)
    for prompts in (PROMPTS, PROMPTS[:1]):
        expected = gloo(1, generate, folder, SAMPLING, prompts)[0]
        results = gloo(layout.world_size, generate, folder, SAMPLING, prompts, layout)
        assert_same(results[0], expected)
        assert all(result == results[0] for result in results)


@pytest.mark.parametrize("layout", [ParallelLayout(tensor=2), ParallelLayout(pipeline=2)], ids=str)
def test_every_rank_says_that_the_logits_are_not_finite(
    gloo: GlooPools, tmp_path: Path, layout: ParallelLayout
) -> None:
    folder = write_hf(tmp_path, "llama", tied=False)
    messages = gloo(2, error_of_diverged, folder, SAMPLING, layout)
    assert messages[0] == messages[1] and "NaN or infinite" in messages[0]


def test_bf16_shards_travel_too(gloo: GlooPools, tmp_path: Path) -> None:
    folder = write_hf(tmp_path, "qwen3", tied=True)
    layout = ParallelLayout(tensor=2, pipeline=2)
    results = gloo(4, generate, folder, SAMPLING, PROMPTS, layout, precision="bf16")
    assert all(result == results[0] for result in results)
    expected = gloo(1, generate, folder, SAMPLING, precision="bf16")[0]
    first = [rollout.logprobs[0] for rollout in results[0]]
    same_first = [a.response_ids[0] == b.response_ids[0] for a, b in zip(results[0], expected, strict=True)]
    assert sum(same_first) >= len(same_first) - 1  # rounding moves a draw that falls on an edge
    for logprob, same, rollout in zip(first, same_first, expected, strict=True):
        assert not same or logprob == pytest.approx(rollout.logprobs[0], abs=0.1)


@pytest.mark.parametrize("cut", [{"top_p": 0.7}, {"top_k": 30, "top_p": 0.95}], ids=str)
def test_every_rank_knows_what_was_kept(gloo: GlooPools, tmp_path: Path, cut: dict[str, float]) -> None:
    folder = write_hf(tmp_path, "qwen3", tied=False)
    sampling = replace(SAMPLING, temperature=1.2, keep_ids=True, **cut)  # type: ignore[arg-type]
    (kept,) = gloo(1, generate_cut_as_training, folder, sampling, ParallelLayout())
    assert kept > 2 * 10 * len(PROMPTS) * SAMPLING.n
    for layout in (ParallelLayout(tensor=2), ParallelLayout(pipeline=2), ParallelLayout(data=2)):
        assert gloo(2, generate_cut_as_training, folder, sampling, layout) == [kept, kept]
