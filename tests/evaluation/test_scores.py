"""avg@k, pass@k and maj@k against all subsets and all votes; the interval against what it promises."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.evaluation import scores
from megatron_opd.evaluation.scores import Graded, bootstrap, majority, pass_at_k, scores_of


def sample(answer: str | None, right: bool = False, tokens: int = 5, truncated: bool = False) -> Graded:
    return Graded(right, answer, float(right), tokens, truncated)


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(right, data):
    k = data.draw(st.integers(1, len(right)))
    subsets = [any(chosen) for chosen in combinations(right, k)]
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(np.mean(subsets), abs=1e-12)


def test_pass_at_k_does_not_overflow():
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("RRab", 1.0),
        ("RRaab", 1 / 2),
        ("RRaabb", 1 / 3),
        ("Rab", 1 / 3),
        ("Raa", 0.0),
        ("aab", 0.0),
        ("---R", 1.0),
        ("---a", 0.0),
        ("----", 0.0),
    ],
)
def test_the_majority_with_ties_broken_by_lot(answers, expected):
    """R is right, - is no answer, other letters are wrong answers."""
    votes = [sample(None if each == "-" else each, right=each == "R") for each in answers]
    assert majority(votes) == pytest.approx(expected)


def test_right_answers_vote_together_however_they_are_written():
    votes = [sample("0.5", right=True), sample(r"\frac12", right=True), sample("3"), sample("4")]
    assert majority(votes) == 1.0


@given(st.lists(st.sampled_from("Rab-"), min_size=1, max_size=6))
def test_the_majority_is_the_mean_over_all_ways_to_break_the_tie(answers):
    counts = {each: answers.count(each) for each in set(answers) - {"-"}}
    first = [each for each in counts if counts[each] == max(counts.values())]
    votes = [sample(None if each == "-" else each, right=each == "R") for each in answers]
    assert majority(votes) == (first.count("R") / len(first) if first else 0.0)


@pytest.mark.parametrize("draw", ["bernoulli", "beta"])
def test_the_interval_holds_the_mean_of_the_population_as_often_as_it_says(draw, monkeypatch):
    monkeypatch.setattr(scores, "RESAMPLES", 1000)
    generator = np.random.default_rng(1)
    held = 0
    for trial in range(400):
        if draw == "bernoulli":
            values, mean = (generator.random(100) < 0.3).astype(float), 0.3
        else:
            values, mean = generator.beta(2, 6, size=100), 0.25
        found = bootstrap(values.tolist(), seed=trial)
        held += found.low <= mean <= found.high
    assert 0.92 <= held / 400 <= 0.98  # 95 %, with three standard deviations of the 400 trials


def test_the_interval_depends_on_the_seed_alone_and_holds_the_mean(monkeypatch):
    values = [0.0, 0.0, 1.0, 0.5, 1.0]
    one = bootstrap(values, seed=3)
    assert one == bootstrap(values, seed=3) and one.low <= one.mean == 0.5 <= one.high
    monkeypatch.setattr(scores, "_AT_ONCE", 7)  # many small pieces
    assert bootstrap(values, seed=3) == one
    assert bootstrap([0.25], seed=0) == scores.Estimate(0.25, 0.25, 0.25)


def test_the_scores_of_a_task():
    problems = [
        [sample("1", right=True), sample("2"), sample(None, truncated=True), sample("2", tokens=9)],
        [sample("1", right=True)] * 4,
    ]
    found = scores_of(problems, seed=0)
    means = {name: estimate.mean for name, estimate in found.metrics.items()}
    assert means == pytest.approx({"avg@4": 5 / 8, "pass@2": (1 / 2 + 1) / 2, "pass@4": 1.0, "maj@4": 1 / 2})
    assert (found.problems, found.k, found.tokens) == (2, 4, 44 / 8)
    assert (found.truncated, found.unanswered, found.score) == (1 / 8, 1 / 8, 5 / 8)
    assert list(scores_of([[sample("1", right=True)]], seed=0).metrics) == ["avg@1"]
    assert "pass@3" in scores_of([[sample("1")] * 3], seed=0).metrics
