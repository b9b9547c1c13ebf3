"""Stands in for SGLang's compiled CPU kernels, as far as serving a dense text model needs them.

SGLang imports about a dozen kernels by name and calls two of them for such a model. Those two are here; any other name
that ends in `_cpu` is a function that refuses when it is called, so that imports succeed. The operator
`convert_weight_packed` must not be defined: without it SGLang runs its plain torch layers.
"""

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

__version__ = "0.0.0"

_WORD = 0xFFFFFFFF  # 32 bits; sums and products of words are taken in int64, whose low bits wrap as theirs do


def refuse(name: str) -> Callable[..., NoReturn]:
    """A kernel that is not here."""

    def kernel(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"the kernel {name} is not part of tools/sglang_cpu (see its README)")

    return kernel


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.endswith("_cpu"):
        return refuse(name)
    raise AttributeError(f"module 'sgl_kernel' has no attribute {name!r}")


def assign_req_to_token_pool_cpu(
    rows: Tensor, table: Tensor, starts: Tensor, ends: Tensor, slots: Tensor, width: int
) -> None:
    """Write the cache slots of new tokens into the requests' rows: table[rows[i], starts[i]:ends[i]] = the next slots.

    `table` [requests, width]; `slots` holds those of the first request, then of the second, and so on.
    """
    lengths = (ends - starts).tolist()
    for row, start, part in zip(rows.tolist(), starts.tolist(), slots.split(lengths), strict=True):
        table[row, start : start + len(part)] = part.to(table.dtype)


def _rotated(word: Tensor, bits: int) -> Tensor:
    return ((word << bits) | (word >> (32 - bits))) & _WORD


def _mixed(state: Tensor, word: Tensor) -> Tensor:
    """MurmurHash3's step for one 32-bit block."""
    word = _rotated(word * 0xCC9E2D51 & _WORD, 15) * 0x1B873593 & _WORD
    return _rotated(state ^ word, 13) * 5 + 0xE6546B64 & _WORD


def murmur_hash32(seed: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
    """MurmurHash3 (32 bits) of (seed, position, column), uint32 [B, V]; `seed` uint64 [B], positions [B], columns [V].

    The low word of the seed, its high word, position and column are the four blocks of a 16-byte message.
    """
    seeds_B1 = seed.view(torch.int64)[:, None]
    state = torch.zeros_like(seeds_B1)
    for word in (seeds_B1, seeds_B1 >> 32, positions.long()[:, None], columns.long()[None, :]):
        state = _mixed(state, word & _WORD)
    state = state ^ 16
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = (state ^ (state >> shift)) * factor & _WORD
    return (state ^ (state >> 16)).to(torch.uint32)


_library = torch.library.Library("sgl_kernel", "FRAGMENT")
_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor columns) -> Tensor")
_library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
