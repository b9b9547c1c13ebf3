"""What the sampled estimators estimate, by enumeration of every response over a small vocabulary.

The student is a free table of logits, one row per prefix, so that every gradient can be written down exactly:
each response counts with its probability, which is a constant. One test draws responses instead.

Shape suffixes: P prefixes, V vocabulary, T positions of all responses one after the other, S responses.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opd.objectives.policy_gradient import discounted_returns, policy_gradient
from megatron_opd.objectives.shaping import shaped_reward

VOCABULARY, LONGEST, END = 4, 3, 3
UNCLIPPED: dict[str, Any] = {"clip_low": None, "clip_high": None, "dual_clip": None}


class Responses:
    """Every response: it stops at the token END, or after LONGEST tokens."""

    def __init__(self) -> None:
        prefixes: dict[tuple[int, ...], int] = {(): 0}
        rows: list[int] = []
        tokens: list[int] = []
        lengths: list[int] = []
        for prefix in prefixes_of_length(LONGEST - 1):
            prefixes.setdefault(prefix, len(prefixes))
            for token in range(VOCABULARY):
                if token == END or len(prefix) == LONGEST - 1:
                    response = (*prefix, token)
                    rows += [prefixes[response[:t]] for t in range(len(response))]
                    tokens += response
                    lengths.append(len(response))
        self.prefix_count = len(prefixes)
        self.row_T, self.token_T, self.length_S = map(torch.tensor, (rows, tokens, lengths))
        self.cu_seqlens = offsets(self.length_S)

    def probabilities(self, logprob_PV: Tensor) -> Tensor:
        """[S]; they sum to 1."""
        parts = logprob_PV[self.row_T, self.token_T].split(self.length_S.tolist())
        return torch.stack([part.sum() for part in parts]).exp()

    def reach(self, logprob_PV: Tensor) -> Tensor:
        """[P], how probable it is that a response comes to each prefix, detached."""
        probability_T = self.probabilities(logprob_PV).detach().repeat_interleave(self.length_S)
        return torch.zeros(self.prefix_count, dtype=torch.float64).index_add(0, self.row_T, probability_T)


def prefixes_of_length(longest: int) -> list[tuple[int, ...]]:
    """All prefixes of at most this length without END, the shorter ones first."""
    found: list[tuple[int, ...]] = [()]
    for prefix in found:
        if len(prefix) < longest:
            found += [(*prefix, token) for token in range(VOCABULARY) if token != END]
    return found


def offsets(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


ALL = Responses()


@pytest.fixture
def student() -> Tensor:
    return 0.7 * table(0)


@pytest.fixture
def teacher_logprob() -> Tensor:
    return table(1).log_softmax(-1)


def table(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ALL.prefix_count, VOCABULARY, generator=generator, dtype=torch.float64)


def kl(logprob_PV: Tensor, teacher_PV: Tensor) -> Tensor:
    """KL(p_s || p_t) after every prefix, [P], differentiable in logprob."""
    return (logprob_PV.exp() * (logprob_PV - teacher_PV)).sum(-1)


def loss_of_each_token(
    logprob_PV: Tensor,
    teacher_PV: Tensor,
    rows: Tensor,
    tokens: Tensor,
    cu_seqlens: Tensor,
    *,
    discount: float,
    baseline: bool = False,
    exact_step: bool = False,
    rollout_PV: Tensor | None = None,
) -> Tensor:
    """The estimator [T] as the objective composes it, without bounds: they have no unbiased gradient."""
    sampled = (rows, tokens)
    reward = shaped_reward(teacher_PV[sampled], logprob_PV[sampled])
    mask = torch.ones(len(rows), dtype=torch.bool)
    advantage = discounted_returns(reward, mask, cu_seqlens, discount=discount, exclude_current=exact_step)
    if baseline:
        advantage = advantage + kl(logprob_PV, teacher_PV).detach()[rows]
    rollout = None if rollout_PV is None else rollout_PV[sampled]
    result = policy_gradient(
        logprob_PV[sampled], advantage, rollout_logprob_N=rollout, importance_cap=1e9, **UNCLIPPED
    )
    return result.loss_N + kl(logprob_PV, teacher_PV)[rows] if exact_step else result.loss_N


def gradients(student: Tensor, teacher_PV: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Gradient of the estimator for every response [S, P * V], and the responses' probabilities [S]."""
    leaf = student.clone().requires_grad_()
    logprob = leaf.log_softmax(-1)
    losses = loss_of_each_token(logprob, teacher_PV, ALL.row_T, ALL.token_T, ALL.cu_seqlens, **options)
    rows = [
        torch.autograd.grad(part.sum(), leaf, retain_graph=True)[0].flatten()
        for part in losses.split(ALL.length_S.tolist())
    ]
    drawn_from = options.get("rollout_PV")
    return torch.stack(rows), ALL.probabilities(logprob.detach() if drawn_from is None else drawn_from)


def expectation(student: Tensor, teacher_PV: Tensor, **options: Any) -> Tensor:
    gradient_S, probability_S = gradients(student, teacher_PV, **options)
    return probability_S @ gradient_S


def variance(student: Tensor, teacher_PV: Tensor, **options: Any) -> float:
    """Trace of the covariance of one response's gradient."""
    gradient_S, probability_S = gradients(student, teacher_PV, **options)
    mean = probability_S @ gradient_S
    return (probability_S @ (gradient_S - mean).square().sum(1)).item()


def sequence_gradient(student: Tensor, teacher_PV: Tensor) -> Tensor:
    """Gradient of sum_S p(S) log(p(S) / q(S)), from the responses' probabilities alone."""
    leaf = student.clone().requires_grad_()
    probability_S = ALL.probabilities(leaf.log_softmax(-1))
    divergence = (probability_S * (probability_S / ALL.probabilities(teacher_PV)).log()).sum()
    return torch.autograd.grad(divergence, leaf)[0].flatten()


def token_gradient(student: Tensor, teacher_PV: Tensor, drawn_from: Tensor | None = None) -> Tensor:
    """Gradient of sum_t E_{c_t} KL(p_s(.|c_t) || p_t(.|c_t)) with the distribution of prefixes a constant."""
    leaf = student.clone().requires_grad_()
    logprob = leaf.log_softmax(-1)
    reach_P = ALL.reach(logprob if drawn_from is None else drawn_from)
    return torch.autograd.grad((reach_P * kl(logprob, teacher_PV)).sum(), leaf)[0].flatten()


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def test_the_enumeration_is_complete(student: Tensor) -> None:
    assert len(ALL.length_S) == 1 + 3 + 9 * 4 and ALL.prefix_count == 1 + 3 + 9
    assert ALL.probabilities(student.log_softmax(-1)).sum().item() == pytest.approx(1.0, abs=1e-12)


def test_discount_one_is_the_sequence_level_kl(student: Tensor, teacher_logprob: Tensor) -> None:
    """arXiv 2603.25562, Eq. 2 and the reward to go."""
    truth = sequence_gradient(student, teacher_logprob)
    close(expectation(student, teacher_logprob, discount=1.0), truth)
    assert (truth - token_gradient(student, teacher_logprob)).abs().max() > 0.05  # they are two things


def test_discount_zero_is_the_token_level_sum(student: Tensor, teacher_logprob: Tensor) -> None:
    close(
        expectation(student, teacher_logprob, discount=0.0),
        token_gradient(student, teacher_logprob),
    )


def test_discounts_between(student: Tensor, teacher_logprob: Tensor) -> None:
    """Every token t adds discount^(t - k) * r_t to the coefficient of each token k <= t."""
    discount, leaf = 0.4, student.clone().requires_grad_()
    logprob = leaf.log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    probability_S = ALL.probabilities(logprob.detach())
    starts = ALL.cu_seqlens.tolist()
    for s, probability in enumerate(probability_S):
        for t in range(starts[s], starts[s + 1]):
            at_t = (ALL.row_T[t], ALL.token_T[t])
            reward = (logprob[at_t] - teacher_logprob[at_t]).detach()
            for k in range(starts[s], t + 1):
                total = (
                    total + probability * discount ** (t - k) * reward * logprob[ALL.row_T[k], ALL.token_T[k]]
                )
    truth = torch.autograd.grad(total, leaf)[0].flatten()
    close(expectation(student, teacher_logprob, discount=discount), truth)


def test_importance_corrects_the_sampled_token(student: Tensor, teacher_logprob: Tensor) -> None:
    """Tokens that another policy drew: the weight restores the token's distribution, not that of prefixes."""
    rollout = (student + 0.5 * table(2)).log_softmax(-1)
    expected = expectation(student, teacher_logprob, discount=0.0, rollout_PV=rollout)
    close(expected, token_gradient(student, teacher_logprob, drawn_from=rollout))
    assert (expected - token_gradient(student, teacher_logprob)).abs().max() > 0.01


@pytest.mark.parametrize("discount", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("option", ["baseline", "exact_step"])
def test_same_expectation(student: Tensor, teacher_logprob: Tensor, discount: float, option: str) -> None:
    """vOPD's baseline and MiniLLM's split leave the expected gradient as it is."""
    plain = expectation(student, teacher_logprob, discount=discount)
    close(expectation(student, teacher_logprob, discount=discount, **{option: True}), plain)


@pytest.mark.parametrize("option", ["baseline", "exact_step"])
@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_less_variance(student: Tensor, discount: float, option: str) -> None:
    sharp = (4.0 * table(1)).log_softmax(-1)
    plain = variance(student, sharp, discount=discount)
    assert variance(student, sharp, discount=discount, **{option: True}) < 0.9 * plain


def test_variance_has_exceptions(student: Tensor) -> None:
    """The baseline is not the best one: with a student sharper than its teacher it costs variance."""
    flat = (0.5 * table(1)).log_softmax(-1)
    plain = variance(student, flat, discount=0.0)
    assert variance(student, flat, discount=0.0, baseline=True) > 1.05 * plain
    assert variance(student, flat, discount=1.0) > plain


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_drawn_responses(student: Tensor, teacher_logprob: Tensor, discount: float) -> None:
    """The mean gradient of packed random responses lies within 4 standard errors of the exact one."""
    generator = torch.Generator().manual_seed(3)
    logprob = student.log_softmax(-1)
    means = torch.stack(
        [drawn_gradient(student, teacher_logprob, discount, generator, logprob) for _ in range(40)]
    )
    error = means.std(0) / len(means) ** 0.5
    truths = [token_gradient(student, teacher_logprob), sequence_gradient(student, teacher_logprob)]
    right, wrong = truths if discount == 0.0 else truths[::-1]
    assert ((means.mean(0) - right).abs() < 4.0 * error).all()
    assert ((means.mean(0) - wrong).abs() > 4.0 * error).any()  # enough responses to tell the two apart


def drawn_gradient(
    student: Tensor, teacher_PV: Tensor, discount: float, generator: torch.Generator, logprob_PV: Tensor
) -> Tensor:
    """Mean gradient over 200 responses, drawn one token after the other and packed."""
    rows, tokens, lengths = [], [], []
    texts = {prefix: row for row, prefix in enumerate(prefixes_of_length(LONGEST - 1))}
    for _ in range(200):
        response: tuple[int, ...] = ()
        while len(response) < LONGEST and END not in response:
            rows.append(texts[response])
            probabilities = logprob_PV[texts[response]].exp()
            tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
            response = (*response, tokens[-1])
        lengths.append(len(response))
    leaf = student.clone().requires_grad_()
    losses = loss_of_each_token(
        leaf.log_softmax(-1),
        teacher_PV,
        torch.tensor(rows),
        torch.tensor(tokens),
        offsets(torch.tensor(lengths)),
        discount=discount,
    )
    return torch.autograd.grad(losses.sum() / 200, leaf)[0].flatten()
