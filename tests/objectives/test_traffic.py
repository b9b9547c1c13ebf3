"""Collectives, and what is kept for the backward pass, of each divergence: counted as its docstring states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_opd.objectives import sampled_logprob, topk_divergence, vocab_parallel_divergence
from tests.gloo_pool import GlooPools
from tests.objectives.cases import KINDS, given, random_case, run_shard
from tests.objectives.linear_cases import random_linear_case, run_linear_shard
from tests.objectives.topk_cases import topk_case
from tools.bench.traffic import recorded_traffic

COUNT, WIDTH = 12, 96
Calls = list[tuple[str, int]]


def numbers(kind: str, *, targets: bool = True, entropies: bool = True) -> Calls:
    """The gathers of statistics that the docstring of vocab_parallel_divergence promises: numbers per token."""
    first = 5 + (kind == "forward_kl") + 2 * targets + 2 * entropies
    return [("all_gather", n * COUNT) for n in ([first, 2] if kind == "jsd" else [first])]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_logits(gloo: GlooPools, divergence: dict[str, Any], world_size: int) -> None:
    case = random_case(COUNT, WIDTH, **divergence)
    for outcome in gloo(world_size, run_shard, case):
        assert outcome.forward == numbers(divergence["kind"]) and outcome.backward == []
        inputs = [numel for numel, is_input in outcome.saved if is_input]
        assert inputs == [COUNT * WIDTH // world_size] * 2
        assert sum(numel for numel, is_input in outcome.saved if not is_input) <= 8 * COUNT


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 5, 100])
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_hidden_states(
    gloo: GlooPools, divergence: dict[str, Any], chunk_size: int, sequence_parallel: bool
) -> None:
    ranks, hidden, teacher_hidden, width = 4, 10, 7, 48
    options: dict[str, Any] = {
        "chunk_size": chunk_size,
        "sequence_parallel": sequence_parallel,
        "entropies": True,
    }
    case = random_linear_case(COUNT, width, hidden, teacher_hidden, **options, **divergence)
    whole = COUNT * hidden
    inputs = [whole, width // ranks * hidden, COUNT * teacher_hidden, width // ranks * teacher_hidden]
    gathered: Calls = []
    if sequence_parallel:
        gathered = [("all_gather", whole // ranks)]
        inputs = inputs[1:]  # of the hidden states the gathered ones are kept
    for outcome in gloo(ranks, run_linear_shard, case):
        assert outcome.forward == gathered + numbers(divergence["kind"])
        assert outcome.backward == [("reduce_scatter" if sequence_parallel else "all_reduce", whole)]
        assert [numel for numel, is_input in outcome.saved if is_input] == inputs
        others = [numel for numel, is_input in outcome.saved if not is_input]
        assert sum(others) <= 8 * COUNT + sequence_parallel * whole


@pytest.mark.parametrize("source", ["teacher_topk", "student_topk_sampled", "server", "server_sampled"])
@pytest.mark.parametrize("remainder", ["renormalize", "bucket", "mass_correction"])
@pytest.mark.parametrize("k", [1, 7, 60])
def test_support(gloo: GlooPools, source: str, remainder: str, k: int) -> None:
    ranks = 4
    case = topk_case(source, k, count=COUNT, width=WIDTH, remainder=remainder)
    served = case.served is not None
    # With the targets and the entropies.
    rows = (2 + 1 + 1 + k) if served else (5 + 2 + 2 + 3 * k)
    for outcome in gloo(ranks, run_shard, case):
        assert outcome.forward == [("all_gather", rows * COUNT)] and outcome.backward == []
        big = [numel for numel, is_input in outcome.saved if is_input]
        assert big.count(COUNT * WIDTH // ranks) == (1 if served else 2)
        others = [numel for numel, is_input in outcome.saved if not is_input]
        assert max(others) <= COUNT * (k + 1), "nothing has the size of the vocabulary"
        assert sum(others) <= COUNT * (20 * (k + 1) + 20)


def plain(case: Any) -> Calls:
    """What each function sends without targets and entropies; then sampled_logprob."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    student, teacher = (logits.chunk(ranks, dim=1)[rank] for logits in (case.student, case.teacher))
    group = dist.group.WORLD
    with recorded_traffic() as calls:
        vocab_parallel_divergence(student, teacher, group=group)
        topk_divergence(student, teacher, k=3, group=group)
        ids = torch.zeros(COUNT, 4, dtype=torch.int64)
        topk_divergence(student, (ids, torch.zeros(COUNT, 4)), group=group)
        sampled_logprob(student, case.targets, group=group)
    return given(calls)


def test_what_is_not_asked_for_is_not_sent(gloo: GlooPools) -> None:
    for calls in gloo(2, plain, random_case(COUNT, WIDTH)):
        assert calls == [("all_gather", n * COUNT) for n in (5, 5 + 3 * 3, 2 + 4, 3)]


def test_one_rank_sends_nothing(gloo: GlooPools) -> None:
    for divergence in KINDS:
        outcome = gloo(1, run_shard, random_case(**divergence))[0]
        assert outcome.forward == outcome.backward == []
        for sequence_parallel in (False, True):
            case = random_linear_case(sequence_parallel=sequence_parallel, **divergence)
            linear = gloo(1, run_linear_shard, case)[0]
            assert linear.forward == linear.backward == []
