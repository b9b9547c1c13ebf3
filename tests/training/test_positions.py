"""Values by position: against sums in plain Python over every token, and the same in every layout."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opd.parallel.groups import ParallelLayout as Layout
from megatron_opd.training.positions import (
    ABSOLUTE_BUCKETS,
    GAP_EDGES,
    PositionSums,
    token_trace,
    traces_of,
)
from tests.gloo_pool import GlooPools
from tests.tiny import recorded_rollouts
from tests.training.parity import RecordingObjective, by_token
from tests.training.tiny_run import IW_OPD, build_run, save_pair

ROLLOUTS = 9
TRACED = 4  # rollouts
NAMES = IW_OPD.value_names


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_pair(folder)
    return folder


def measured(layout: Layout, models: Path) -> tuple[dict[str, Any], list[Any], dict[tuple[str, int], Any]]:
    """(row, traces of the first rollouts, statistics by token) of the recorded rollouts."""
    recording = RecordingObjective(token_weight=IW_OPD.token_weight)
    run = build_run(layout, models, objective=recording)
    rollouts = recorded_rollouts(ROLLOUTS)
    packed = run.pack(rollouts)
    lengths = [len(rollout.response_ids) for rollout in rollouts[:TRACED]]
    found = run.measure(packed, lengths)
    row = run.objective.positions.row(found.by_position)
    tokens = by_token(run, packed[run.groups.dp.rank()], rollouts, recording.records)
    return row, traces_of(found.trace, NAMES, lengths), {key: value.tolist() for key, value in tokens.items()}


@pytest.fixture(scope="module")
def one_process(gloo: GlooPools, models: Path) -> Any:
    return cache(lambda: gloo(1, measured, Layout(), models)[0])


def bucket(place: int) -> int:
    return 0 if place == 0 else 1 + int(math.log2(place))


def test_as_sums_over_every_token(one_process: Any) -> None:
    row, traces, tokens = one_process()
    rollouts = {rollout.prompt_id: rollout for rollout in recorded_rollouts(ROLLOUTS)}
    relative: dict[int, list[Any]] = {place: [] for place in range(10)}
    absolute: dict[int, list[Any]] = {}
    counts: dict[tuple[int, int], int] = {}
    for (prompt, place), (student, teacher, reverse_kl, weight) in tokens.items():
        gap = teacher - student
        values = {"student_logprob": student, "log_gap": gap, "reverse_kl": reverse_kl, "weight": weight}
        values |= {"abs_log_gap": abs(gap), "loss": weight * reverse_kl}
        relative[math.floor(10 * place / len(rollouts[prompt].response_ids))].append(values)
        absolute.setdefault(bucket(place), []).append(values)
        key = bucket(place), sum(edge < gap for edge in GAP_EDGES)
        counts[key] = counts.get(key, 0) + 1
    assert len(absolute) > 3 and all(relative.values())
    for where, bins in (("relative", relative), ("absolute", absolute)):
        assert row[where]["tokens"] == [len(bins[i]) for i in range(len(bins))]
        for name in ("student_logprob", "log_gap", "reverse_kl", "weight", "abs_log_gap", "loss"):
            expected = [sum(value[name] for value in bins[i]) / len(bins[i]) for i in range(len(bins))]
            assert row[where][name] == pytest.approx(expected, rel=1e-5, abs=1e-6), (where, name)
    assert row["absolute"]["first"] == [0, 1, 2, 4, 8, 16][: len(absolute)]
    found = row["log_gap_counts"]["counts"]
    assert {(i, j): n for i, line in enumerate(found) for j, n in enumerate(line) if n} == counts
    for rollout, trace in zip(list(rollouts.values())[:TRACED], traces, strict=True):
        for place in range(len(rollout.response_ids)):
            student, teacher, _, weight = tokens[rollout.prompt_id, place]
            found = [trace[name][place] for name in ("weight", "student_logprob", "log_gap")]
            assert found == pytest.approx([weight, student, teacher - student], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2, sequence_parallel=True),
        Layout(context=2),
        Layout(pipeline=2),
        Layout(data=2),
        Layout(tensor=2, context=2),
    ],
    ids=str,
)
def test_as_in_one_process(gloo: GlooPools, models: Path, one_process: Any, layout: Layout) -> None:
    expected, expected_traces, _ = one_process()
    for row, traces, _ in gloo(layout.world_size, measured, layout, models):
        assert row["log_gap_counts"] == expected["log_gap_counts"]
        for where in ("relative", "absolute"):
            assert row[where].keys() == expected[where].keys() >= set(NAMES)
            for name, values in expected[where].items():
                assert row[where][name] == pytest.approx(values, rel=1e-5, abs=1e-5), (where, name)
        for trace, known in zip(traces, expected_traces, strict=True):
            for name, values in known.items():
                assert trace[name] == pytest.approx(values, rel=1e-5, abs=1e-5)


def test_far_places_share_the_last_bucket_and_numbers_that_are_not_finite_are_null() -> None:
    places = torch.tensor([0, 65535, 65536, 10**6])
    values = {"loss": torch.tensor([1.0, 2.0, math.nan, 4.0]).double()}
    sums = PositionSums(("loss",))
    row = sums.row(sums.of(values, places, torch.full((4,), 10**6 + 1)))
    assert row["absolute"]["tokens"] == [1, *[0] * (ABSOLUTE_BUCKETS - 3), 1, 2]
    assert row["absolute"]["loss"] == [1.0, *[None] * (ABSOLUTE_BUCKETS - 3), 2.0, None]
    assert row["absolute"]["first"][-2:] == [32768, 65536] and row["relative"]["tokens"][9] == 1
    assert "log_gap_counts" not in row


def test_no_tokens_are_no_buckets() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    sums = PositionSums(("loss",))
    row = sums.row(sums.of({"loss": torch.zeros(0).double()}, nothing, nothing))
    assert row["absolute"] == {"tokens": [], "loss": [], "first": []}
    assert row["relative"]["loss"] == [None] * 10


def test_a_trace_ends_where_the_tokens_that_are_traced_end() -> None:
    values = {"loss": torch.ones(3).double(), "weight": torch.tensor([0.5, 0.25, 0.75]).double()}
    trace = token_trace(values, torch.tensor([4, 0, 2]), 4)
    assert traces_of(trace, ("loss", "weight"), [3, 2]) == [
        {"weight": [0.25, None, 0.75]},
        {"weight": [None, None]},
    ]
