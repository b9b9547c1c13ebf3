"""Noise and token draws against plain float64 formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_opd.rollout.sampling import FIRST_CANDIDATES, NOT_DRAWN, Sampling, sample_tokens, uniforms

KEYS = st.tuples(st.integers(0, 2**63), st.text(max_size=20), st.integers(0, 10_000))


def settings_of(**changes: float) -> Sampling:
    return Sampling(max_new_tokens=1, seed=0, **changes)  # type: ignore[arg-type]


@settings(deadline=None)
@given(KEYS, st.integers(1, 50), st.integers(1, 50))
def test_noise_depends_on_the_key_and_the_position_alone(key, short, long):
    short, long = sorted((short, long))
    seed, prompt_id, sample = key
    numbers = uniforms(seed, prompt_id, sample, long).tolist()
    assert uniforms(seed, prompt_id, sample, short).tolist() == numbers[:short]
    assert all(0 <= number < 1 for number in numbers)


@settings(deadline=None)
@given(KEYS, KEYS)
def test_different_keys_have_different_noise(one, other):
    numbers, others = (uniforms(seed, prompt_id, sample, 4) for seed, prompt_id, sample in (one, other))
    assert (numbers.tolist() == others.tolist()) == (one == other)


def test_noise_never_changes_between_versions():
    expected = [0.862281033427422, 0.3485198001630918, 0.4840190804491009]
    assert uniforms(1, "12@0", 3, 3).tolist() == pytest.approx(expected, abs=0)


def test_noise_is_uniform():
    numbers = np.concatenate([uniforms(0, str(row), sample, 50) for row in range(100) for sample in range(4)])
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    assert chi_square(counts, np.full(50, len(numbers) / 50)) < threshold(49)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def threshold(degrees: int) -> float:
    """Five standard deviations above the mean of the statistic."""
    return degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("vocab", [1, 5, 127, 128, 300])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), temperature=st.sampled_from([0.3, 1.0, 2.0]), padding=st.integers(0, 140))
def test_draw_is_the_inverse_cdf(vocab, seed, temperature, padding):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, vocab + padding, generator=generator) * 4
    logits[:, vocab:] = 1e4  # what padding rows give is arbitrary
    noise = torch.rand(6, dtype=torch.float64, generator=generator)
    noise[0], noise[1] = 0.0, 1 - 2.0**-53
    ids, logprobs, *_ = sample_tokens(logits, noise, settings_of(temperature=temperature), vocab)
    wanted = (logits[:, :vocab].double() / temperature).log_softmax(-1)
    cumulative = wanted.exp().cumsum(-1)
    upper = cumulative.gather(1, ids[:, None])[:, 0]
    lower = upper - wanted.exp().gather(1, ids[:, None])[:, 0]
    assert (lower <= noise + 1e-6).all() and (noise <= upper + 1e-6).all()
    torch.testing.assert_close(logprobs.double(), wanted.gather(1, ids[:, None])[:, 0], atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, 40),
        ({"temperature": 0.5}, 40),
        ({"top_k": 7}, 7),
        ({"top_p": 0.8}, None),
        ({"top_k": 12, "top_p": 0.7}, None),
    ],
)
def test_frequencies_are_the_softmax_of_what_is_kept(changes, kept):
    vocab, draws = 40, 40_000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 1.5
    noise = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ids, logprobs, *_ = sample_tokens(logits.expand(draws, -1), noise, settings_of(**changes), vocab)
    probs = (logits.double() / changes.get("temperature", 1.0)).softmax(-1)
    torch.testing.assert_close(logprobs.double(), probs.log()[ids], atol=1e-5, rtol=1e-5)
    probs = truncate(probs, int(changes.get("top_k", 0)), changes.get("top_p", 1.0))
    support = probs > 0
    assert kept is None or int(support.sum()) == kept
    counts = torch.bincount(ids, minlength=vocab)
    assert not counts[~support].any()
    degrees = int(support.sum()) - 1
    assert chi_square(counts[support].numpy(), (probs[support] * draws).numpy()) < threshold(degrees)


def truncate(probs: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The kept and renormalised distribution, token by token; top_p is of the whole, as SGLang has it."""
    kept: list[int] = []
    for token in probs.argsort(descending=True).tolist()[: top_k or None]:
        if kept and float(probs[kept].sum()) >= top_p:
            break
        kept.append(token)
    result = torch.zeros_like(probs)
    result[kept] = probs[kept] / probs[kept].sum()
    return result


def test_top_p_looks_past_its_first_candidates():
    vocab = 8 * FIRST_CANDIDATES + 100
    noise = torch.linspace(0, 1 - 1e-9, 9000, dtype=torch.float64)
    logits = torch.zeros(1, vocab)
    ids, *_ = sample_tokens(logits.expand(9000, -1)[:64], noise[-64:], settings_of(top_p=0.95), vocab)
    assert len(set(ids.tolist())) > 32
    logits[0, 5] = 20.0  # one row is decided by its first candidate, the other needs them all
    rows = torch.cat((logits, torch.zeros(1, vocab)))
    ids, *_ = sample_tokens(
        rows, torch.tensor([0.99, 0.5], dtype=torch.float64), settings_of(top_p=0.95), vocab
    )
    assert ids[0] == 5


@pytest.mark.parametrize("changes", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 0.0}])
def test_the_likeliest_token_is_always_kept(changes):
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(3))
    noise = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    ids, logprobs, *_ = sample_tokens(logits, noise, settings_of(**changes), 290)
    assert torch.equal(ids, logits[:, :290].argmax(-1))
    torch.testing.assert_close(logprobs, logits[:, :290].log_softmax(-1).max(-1).values)


def test_tokens_without_weight_are_never_drawn():
    logits = torch.full((3, 400), -torch.inf)
    logits[:, 200] = 0.0
    noise = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    ids, logprobs, *_ = sample_tokens(logits, noise, settings_of(), 400)
    assert ids.tolist() == [200] * 3 and logprobs.tolist() == [0.0] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"top_p": 0.9}])
def test_nothing_is_drawn_from_logits_that_are_not_finite(bad, changes):
    logits = torch.zeros(2, 10)
    logits[1, 3] = bad
    ids, logprobs, *_ = sample_tokens(logits, torch.zeros(2, dtype=torch.float64), settings_of(**changes), 10)
    assert ids.tolist() == [NOT_DRAWN] * 2 and logprobs.isnan().all()


CUTS = st.tuples(st.sampled_from([0, 1, 2, 7, 40]), st.sampled_from([1e-9, 0.3, 0.9, 1.0]))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), cut=CUTS, temperature=st.sampled_from([0.5, 1.0, 3.0]))
def test_drawn_logprobs_are_a_distribution_over_the_kept_ids(seed, cut, temperature):
    """The softmax renormalised over the kept ids, whichever of them is drawn."""
    top_k, top_p = cut
    assume(top_k or top_p < 1)
    vocab, draws = 40, 400
    logits = torch.randn(vocab + 9, generator=torch.Generator().manual_seed(seed)) * 2
    noise = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    changes = {"top_k": top_k, "top_p": top_p, "temperature": temperature, "keep_ids": True}
    ids, logprobs, drawn, kept = sample_tokens(logits.expand(draws, -1), noise, settings_of(**changes), vocab)
    assert kept is not None and len({tuple(row) for row in kept.lists()}) == 1
    probs = (logits[:vocab].double() / temperature).softmax(-1)
    expected = truncate(probs, top_k, top_p)
    assert set(kept.lists()[0]) == set(expected.nonzero()[:, 0].tolist())
    assert kept.hold(ids).all()
    torch.testing.assert_close(drawn.double(), expected.log()[ids], atol=1e-5, rtol=1e-5)
    mass = probs[kept.lists()[0]].sum()
    torch.testing.assert_close((logprobs - drawn).double().exp(), mass.expand(draws), atol=1e-5, rtol=1e-5)
    found = dict(zip(ids.tolist(), drawn.exp().tolist(), strict=True))
    if len(found) == len(kept.lists()[0]):
        assert sum(found.values()) == pytest.approx(1.0, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), temperature=st.sampled_from([0.0, 0.7, 1.0]))
def test_top_p_of_one_cuts_nothing(seed, temperature):
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(seed)) * 3
    noise = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    plain = sample_tokens(logits, noise, settings_of(temperature=temperature), 290)
    same = sample_tokens(logits, noise, settings_of(temperature=temperature, top_p=1.0, keep_ids=True), 290)
    for draws in (plain, same):
        assert draws.kept is None and torch.equal(draws.drawn_logprobs_B, draws.logprobs_B)
    assert torch.equal(plain.ids_B, same.ids_B) and torch.equal(plain.logprobs_B, same.logprobs_B)
    everything = sample_tokens(logits, noise, settings_of(temperature=0.7, top_k=290, keep_ids=True), 290)
    torch.testing.assert_close(everything.drawn_logprobs_B, everything.logprobs_B)
    assert everything.kept is not None and everything.kept.counts_N.tolist() == [290] * 5


def test_an_id_without_weight_is_not_kept():
    logits = torch.full((2, 20), -torch.inf)
    logits[:, [3, 7]] = torch.tensor([1.0, 0.0])
    _, logprobs, drawn, kept = sample_tokens(
        logits, torch.tensor([0.1, 0.99], dtype=torch.float64), settings_of(top_k=5, keep_ids=True), 20
    )
    assert kept is not None and kept.lists() == [[3, 7]] * 2
    torch.testing.assert_close(drawn, logprobs)
