"""The token weights, dense and in float64, one token after the other."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def token_weights(
    log_gap: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    *,
    kind: str = "cumulative_share",
    gamma: float = 0.5,
    floor: float = 1.0,
    signed: bool = False,
    alpha: float = 0.1,
    clip: float = 10.0,
    fraction: float = 0.3,
    unit_mean: bool = False,
    progress: float = 0.0,
) -> Tensor:
    """The weights of `objectives.token_weights`, [T] float64, of the whole buffer."""
    weights = torch.zeros(len(log_gap), dtype=torch.float64)
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        tokens = [t for t in range(start, stop) if mask[t]]
        gaps = [float(log_gap[t]) for t in tokens]
        if kind == "uniform":
            weights[tokens] = 1.0
            continue
        if kind == "cumulative_share":
            shape = _remaining_share(gaps, signed)
        elif kind == "prefix_ratio":
            shape = _prefix_ratio(gaps, alpha, clip)
        else:
            shape = _by_place(len(gaps), kind, fraction, progress)
        response = torch.tensor([floor + gamma * s for s in shape], dtype=torch.float64)
        if unit_mean and len(tokens) > 0 and response.mean() != 0.0:
            response = response / response.mean()
        weights[tokens] = response
    return weights


def _remaining_share(gaps: list[float], signed: bool) -> list[float]:
    if not all(math.isfinite(gap) for gap in gaps):
        return [math.nan] * len(gaps)
    values = gaps if signed else [abs(gap) for gap in gaps]
    total = math.fsum(values)
    shape = []
    for i in range(len(values)):
        before = math.fsum(values[:i])
        if total == 0.0:
            shape.append(0.0 if before > 0.0 else 1.0)
        else:
            shape.append(min(max(1.0 - before / total, 0.0), 1.0))
    return shape


def _prefix_ratio(gaps: list[float], alpha: float, clip: float) -> list[float]:
    if not all(math.isfinite(gap) for gap in gaps):
        return [math.nan] * len(gaps)
    exponents = [alpha * math.fsum(gaps[:i]) for i in range(len(gaps))]
    return [clip if exponent > math.log(clip) else math.exp(exponent) for exponent in exponents]


def _by_place(count: int, kind: str, fraction: float, progress: float) -> list[float]:
    if kind == "linear_decay":
        return [1.0 - i / count for i in range(count)]
    if kind == "increasing":
        return [(i + 1) / count for i in range(count)]
    if kind == "curriculum":
        fraction = fraction + (1.0 - fraction) * (1.0 - math.cos(math.pi * progress)) / 2.0
    width = math.ceil(round(fraction * count, 9))
    if kind == "suffix_window":
        return [0.0] * (count - width) + [1.0] * width
    if kind in ("prefix_window", "curriculum"):
        return [1.0] * width + [0.0] * (count - width)
    raise ValueError(f"unknown token weight kind {kind!r}")
