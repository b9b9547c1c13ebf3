"""Packed responses and settings for the tests of the token weights."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

READS_GAPS = ("cumulative_share", "prefix_ratio")
Packed = tuple[Tensor, Tensor, Tensor]

# Every kind with settings that matter to it.
SETTINGS: list[dict[str, Any]] = [
    {"kind": "uniform"},
    {"kind": "cumulative_share"},
    {"kind": "cumulative_share", "signed": True},
    {"kind": "prefix_ratio"},
    {"kind": "prefix_ratio", "alpha": 0.7, "clip": 1.5},
    {"kind": "prefix_window"},
    {"kind": "suffix_window", "fraction": 0.5},
    {"kind": "curriculum", "progress": 0.0},
    {"kind": "curriculum", "fraction": 0.1, "progress": 0.4},
    {"kind": "curriculum", "progress": 1.0},
    {"kind": "linear_decay"},
    {"kind": "increasing"},
]


def setting_name(setting: dict[str, Any]) -> str:
    return "-".join(str(value) for value in setting.values())


def pack(parts: list[tuple[list[float], list[bool]]]) -> Packed:
    """Responses of gaps and masks -> one packed buffer."""
    gaps = torch.tensor([gap for part in parts for gap in part[0]], dtype=torch.float64)
    mask = torch.tensor([real for part in parts for real in part[1]], dtype=torch.bool)
    offsets = [0, *itertools.accumulate(len(part[0]) for part in parts)]
    return gaps, mask, torch.tensor(offsets, dtype=torch.int32)


def exact_gaps(count: int, seed: int) -> Tensor:
    """Multiples of 2^-20, whose sums and differences are exact in float64 in any order."""
    return (
        torch.randn(count, generator=torch.Generator().manual_seed(seed)).double() * 2**20
    ).round() / 2**20


@st.composite
def packed(draw: st.DrawFn) -> Packed:
    """Up to 6 responses, some empty, some fully masked, some without a gap, each of its own scale."""
    parts = []
    for length in draw(st.lists(st.integers(0, 9), max_size=6)):
        seed = draw(st.integers(0, 2**31))
        generator = torch.Generator().manual_seed(seed)
        gaps = exact_gaps(length, seed) * draw(st.sampled_from([2.0**-20, 1.0, 32.0]))
        gaps *= torch.rand(length, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
        mask = torch.rand(length, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
        parts.append((gaps.where(mask, torch.nan).tolist(), mask.tolist()))
    return pack(parts)


def masks(length: int) -> dict[str, list[bool]]:
    """What the mask looks like in training, for a response of at least 6 positions with its prompt."""
    yes, no = [True], [False]
    return {
        "all": yes * length,
        "prompt": no * 2 + yes * (length - 2),
        "special token in the middle": yes * 3 + no + yes * (length - 4),
        "padding": yes * (length - 2) + no * 2,
        "all three": no * 2 + yes + no + yes * (length - 5) + no,
        "fully masked": no * length,
        "one token": no * 3 + yes + no * (length - 4),
    }


def scenes() -> dict[str, Packed]:
    """One padded response for every mask, the same packed together, and gaps that are 0."""
    single = {}
    for seed, (label, mask) in enumerate(masks(9).items()):
        gaps = exact_gaps(9, seed).where(torch.tensor(mask), torch.nan).tolist()
        single[label] = (gaps, mask)
    single["no gaps"] = ([0.0] * 9, [False, *[True] * 7, False])
    return {label: pack([part]) for label, part in single.items()} | {"packed": pack(list(single.values()))}
