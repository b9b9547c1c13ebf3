"""Divergences of whole logits, dense and in float64; gradients come from autograd.

Shape suffixes: N tokens, V vocabulary, K ids of a support.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_opd.objectives.kept_ids import KeptIds
from megatron_opd.objectives.stats import TokenStats


def vocab_parallel_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    targets: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    kept: KeptIds | None = None,
) -> TokenStats:
    """TokenStats with all fields (log-probabilities only with targets) from the whole logits [N, V]."""
    student_NV = _log_softmax(student_logits, temperature, vocab_size, kept)
    teacher_NV = _log_softmax(teacher_logits.detach(), temperature, vocab_size, kept)
    student_NV, teacher_NV = student_NV[:, :vocab_size], teacher_NV[:, :vocab_size]
    if kind == "reverse_kl":
        divergence_N = _kl(student_NV, teacher_NV)
    elif kind == "forward_kl":
        divergence_N = _kl(teacher_NV, student_NV)
    elif kind == "jsd":
        mixture_NV = beta * teacher_NV.exp() + (1 - beta) * student_NV.exp()
        mixture_NV = mixture_NV.where(mixture_NV > 0.0, 1.0).log()  # of what neither draws it is not read
        divergence_N = beta * _kl(teacher_NV, mixture_NV) + (1 - beta) * _kl(student_NV, mixture_NV)
    else:
        raise ValueError(f"unknown divergence kind {kind!r}")
    return _stats(divergence_N, student_NV, teacher_NV, targets)


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    **options: object,
) -> TokenStats:
    """The same from hidden states [N, D] and whole heads [V, D]."""
    student_logits = student_hidden.double() @ student_weight.double().T
    teacher_logits = teacher_hidden.double() @ teacher_weight.double().T
    return vocab_parallel_divergence(student_logits, teacher_logits, **options)  # type: ignore[arg-type]


def topk_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    k: int,
    kind: str = "reverse_kl",
    support: str = "teacher_topk",
    remainder: str = "renormalize",
    targets: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    importance_cap: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    kept: KeptIds | None = None,
) -> TokenStats:
    """The divergence on the k best ids of one model, as a masked sum over the whole vocabulary."""
    student_NV = _log_softmax(student_logits, temperature, vocab_size, kept)[:, :vocab_size]
    teacher_NV = _log_softmax(teacher_logits.detach(), temperature, vocab_size, kept)[:, :vocab_size]
    scores_NV = (teacher_NV if support.startswith("teacher") else student_NV).detach()
    best_NK = scores_NV.sort(dim=1, descending=True, stable=True).indices[:, :k]
    inside_NV = torch.zeros_like(scores_NV, dtype=torch.bool).scatter(1, best_NK, True)
    inside_NV &= scores_NV > -torch.inf
    if support.endswith("_sampled"):
        assert targets is not None
        inside_NV = inside_NV.scatter(1, targets[:, None], True)
    first_NV, second_NV = (student_NV, teacher_NV) if kind == "reverse_kl" else (teacher_NV, student_NV)
    first_NV = first_NV.masked_fill(~inside_NV, -torch.inf)
    second_NV = second_NV.masked_fill(~inside_NV, -torch.inf)
    if remainder == "renormalize":
        divergence_N = _kl(first_NV.log_softmax(1), second_NV.log_softmax(1))
    else:
        divergence_N = _kl(first_NV, second_NV)
    if remainder == "mass_correction":
        divergence_N = divergence_N - first_NV.exp().sum(1) + second_NV.exp().sum(1)
    if remainder == "bucket":
        first_N, second_N = 1 - first_NV.exp().sum(1), 1 - second_NV.exp().sum(1)
        divergence_N = divergence_N + (first_N * (first_N / second_N).log()).where(first_N > 1e-14, 0.0)
    if remainder == "sampled_tail":
        assert targets is not None
        student_N = student_NV.gather(1, targets[:, None])[:, 0]
        teacher_N = teacher_NV.gather(1, targets[:, None])[:, 0]
        importance_N = torch.ones_like(teacher_N)
        if rollout_logprob is not None:
            importance_N = (student_N.detach() - rollout_logprob.double()).exp()
        if importance_cap is not None:
            importance_N = importance_N.clamp(max=importance_cap)
        tail_N = importance_N * (student_N - student_N.detach()).exp() * (student_N.detach() - teacher_N)
        outside_N = ~inside_NV.gather(1, targets[:, None])[:, 0]
        mass_N = first_NV.exp().sum(1)
        divergence_N = divergence_N - (mass_N - mass_N.detach()) + tail_N.where(outside_N, 0.0)
    masses = [(model_NV.exp() * inside_NV).sum(1).detach() for model_NV in (student_NV, teacher_NV)]
    return _stats(divergence_N, student_NV, teacher_NV, targets, *masses)


def _stats(
    divergence_N: Tensor, student_NV: Tensor, teacher_NV: Tensor, targets: Tensor | None, *masses: Tensor
) -> TokenStats:
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
        _kl(student_NV, teacher_NV).detach(),
        *masses,
    )


def _log_softmax(
    logits_NV: Tensor, temperature: float, vocab_size: int | None, kept: KeptIds | None
) -> Tensor:
    scaled_NV = logits_NV.double() / temperature
    if vocab_size is not None:
        padding_V = torch.arange(scaled_NV.shape[1]) >= vocab_size
        scaled_NV = scaled_NV.masked_fill(padding_V, -torch.inf)
    if kept is not None:
        kept_NV = torch.zeros_like(scaled_NV, dtype=torch.bool)
        for row, ids in enumerate(kept.lists()):
            kept_NV[row, ids] = True
        scaled_NV = scaled_NV.masked_fill(~kept_NV, -torch.inf)
    return torch.log_softmax(scaled_NV, dim=-1)


def _kl(first_NV: Tensor, second_NV: Tensor) -> Tensor:
    return _expectation(first_NV, first_NV - second_NV)


def _expectation(logprob_NV: Tensor, values_NV: Tensor) -> Tensor:
    """sum_v p(v) * value(v), where outcomes of probability 0 add 0 whatever their value is."""
    return (logprob_NV.exp() * values_NV.where(logprob_NV > -torch.inf, 0.0)).sum(-1)
