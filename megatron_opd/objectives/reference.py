"""The same functions, dense, in float64, slow and plain: what all others are tested against.

Nothing here is sharded, blocked or clever. Gradients come from autograd. Shape suffixes: N tokens, V
vocabulary.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from megatron_opd.objectives.stats import TokenStats


def vocab_parallel_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: str = "reverse_kl",
    targets: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> TokenStats:
    """TokenStats with all fields (log-probabilities only with targets) from the whole logits [N, V]."""
    student_NV = _log_softmax(student_logits, temperature, vocab_size)
    teacher_NV = _log_softmax(teacher_logits.detach(), temperature, vocab_size)
    if kind == "reverse_kl":
        divergence_N = _expectation(student_NV, student_NV - teacher_NV)
    else:
        raise ValueError(f"unknown divergence kind {kind!r}")
    student_logprob_N = teacher_logprob_N = None
    if targets is not None:
        student_logprob_N = student_NV.gather(1, targets[:, None])[:, 0]
        teacher_logprob_N = teacher_NV.gather(1, targets[:, None])[:, 0]
    return TokenStats(
        divergence_N,
        student_logprob_N,
        teacher_logprob_N,
        _expectation(student_NV, -student_NV).detach(),
        _expectation(teacher_NV, -teacher_NV),
    )


def token_weights(
    log_gap_N: Tensor,
    mask_N: Tensor,
    cu_seqlens: Tensor,
    *,
    kind: str = "cumulative_share",
    gamma: float = 0.5,
    unit_mean: bool = False,
) -> Tensor:
    """The weights of `objectives.token_weights`, float64, one token after the other."""
    weights_N = torch.zeros(len(log_gap_N), dtype=torch.float64)
    offsets = cu_seqlens.tolist()
    for start, stop in itertools.pairwise(offsets):
        tokens = [t for t in range(start, stop) if mask_N[t]]
        total = sum(abs(float(log_gap_N[t])) for t in tokens)
        before = 0.0
        for t in tokens:
            share = before / total if total > 0.0 else 0.0
            weights_N[t] = 1.0 + gamma * (1.0 - share) if kind == "cumulative_share" else 1.0
            before += abs(float(log_gap_N[t]))
        if unit_mean and tokens:
            weights_N[tokens] /= weights_N[tokens].mean()
    return weights_N


def loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    *,
    divergence: str = "reverse_kl",
    token_weight: str = "uniform",
    gamma: float = 0.5,
    unit_mean: bool = False,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """The scalar sum_t mask_t * w_t * divergence_t over a packed buffer: logits [T, V], the others [T]."""
    stats = vocab_parallel_divergence(
        student_logits,
        teacher_logits,
        kind=divergence,
        targets=targets,
        temperature=temperature,
        vocab_size=vocab_size,
    )
    weights_T = token_weights(
        stats.log_gap, mask, cu_seqlens, kind=token_weight, gamma=gamma, unit_mean=unit_mean
    )
    return (weights_T * stats.divergence)[mask].sum()


def _log_softmax(logits_NV: Tensor, temperature: float, vocab_size: int | None) -> Tensor:
    scaled_NV = logits_NV.double() / temperature
    if vocab_size is not None:
        padding_V = torch.arange(scaled_NV.shape[1]) >= vocab_size
        scaled_NV = scaled_NV.masked_fill(padding_V, -torch.inf)
    return torch.log_softmax(scaled_NV, dim=-1)


def _expectation(logprob_NV: Tensor, values_NV: Tensor) -> Tensor:
    """sum_v p(v) * value(v), where outcomes of probability 0 add 0 whatever their value is."""
    return (logprob_NV.exp() * values_NV.where(logprob_NV > -torch.inf, 0.0)).sum(-1)
