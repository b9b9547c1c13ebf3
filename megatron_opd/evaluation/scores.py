"""avg@k, pass@k and maj@k of a task from its graded samples, with bootstrap intervals over its problems.

Problems are what a task draws from a population, so they are what is resampled; samples of one problem belong together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
_AT_ONCE = 4_000_000  # indices of resampled problems in memory at once


@dataclass(frozen=True)
class Graded:
    """One sample. `answer` is None where the response gave none; equal answers have equal texts."""

    right: bool
    answer: str | None
    score: float
    tokens: int
    truncated: bool


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and the interval that holds it with CONFIDENCE."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskScores:
    """What a task's samples come to. `metrics` has avg@k, maj@k and pass@j for j = 2, 4, ... and k."""

    problems: int
    k: int
    metrics: dict[str, Estimate]
    score: float  # mean of what the scorer gives, partial credit included
    tokens: float  # of a response
    truncated: float  # share of responses that were cut off
    unanswered: float  # share of responses without an answer


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that k of the `samples`, drawn without replacement, have a right one: unbiased for k independent samples.

    1 - C(n - c, k) / C(n, k).
    """
    assert 0 <= right <= samples and 1 <= k <= samples
    return 1 - comb(samples - right, k) / comb(samples, k)


def majority(samples: Sequence[Graded]) -> float:
    """Chance that the most frequent answer is right, where ties are broken by lot. Samples without answer do not vote.

    All right answers count as one, however they are written.
    """
    votes: dict[str | None, int] = {}
    for sample in samples:
        if sample.right:
            votes[None] = votes.get(None, 0) + 1
        elif sample.answer is not None:
            votes[sample.answer] = votes.get(sample.answer, 0) + 1
    if not votes:
        return 0.0
    most = max(votes.values())
    return float(votes.get(None) == most) / sum(count == most for count in votes.values())


def bootstrap(values: Sequence[float], seed: int) -> Estimate:
    """Mean of the values, and the percentile interval of the means of RESAMPLES resamples of them."""
    each = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    chunk = max(1, _AT_ONCE // len(each))
    means = np.concatenate(
        [
            each[generator.integers(len(each), size=(min(chunk, RESAMPLES - start), len(each)))].mean(1)
            for start in range(0, RESAMPLES, chunk)
        ]
    )
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return Estimate(float(each.mean()), float(low), float(high))


def scores_of(problems: Sequence[Sequence[Graded]], seed: int) -> TaskScores:
    """The scores of a task; every problem has the same number of samples, one at least."""
    k = len(problems[0])
    assert k and all(len(samples) == k for samples in problems)
    right = [sum(sample.right for sample in samples) for samples in problems]
    metrics = {f"avg@{k}": bootstrap([count / k for count in right], seed)}
    for j in sorted({2**power for power in range(1, k.bit_length())} | {k}):
        if 1 < j <= k:
            metrics[f"pass@{j}"] = bootstrap([pass_at_k(k, count, j) for count in right], seed)
    if k > 1:
        metrics[f"maj@{k}"] = bootstrap([majority(samples) for samples in problems], seed)
    samples = [sample for each in problems for sample in each]

    def share(values: Sequence[float]) -> float:
        return float(sum(values) / len(samples))

    return TaskScores(
        problems=len(problems),
        k=k,
        metrics=metrics,
        score=share([sample.score for sample in samples]),
        tokens=share([sample.tokens for sample in samples]),
        truncated=share([sample.truncated for sample in samples]),
        unanswered=share([sample.answer is None for sample in samples]),
    )
