"""How a token is drawn: the sampling settings, the noise, and logits -> (token, log-probs, what was kept).

The noise is counter-based: one uniform number for every (seed, prompt id, sample, position). A response is therefore
the same whatever the parallel layout, whichever prompts share its batch, and after a resume, up to rounding of the
logits.

Shapes: B sequences, V vocabulary (with padding), C candidate tokens, K blocks of the vocabulary.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_opd.objectives.kept_ids import KeptIds

NOT_DRAWN = -1  # the id of every row when some row's logits are not finite
STOPPED = -2  # the id of every row when the run is asked to stop: nothing is drawn any more
BLOCK = 128  # tokens a block of the two-level inverse CDF
FIRST_CANDIDATES = 1024  # top-p looks at that many of the likeliest tokens before it looks at more


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of one `generate` call.

    A token is drawn from softmax(logits / temperature), cut to the `top_k` likeliest tokens (0: no cut) and to the
    smallest set of likeliest tokens that holds at least `top_p` of all probability (1: no cut): what both keep, as
    SGLang does it. `temperature` 0 takes the likeliest token.
    """

    max_new_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()
    n: int = 1  # samples a prompt
    keep_ids: bool = False  # record which ids the cut left, where there is one
    tells_cut: bool = True  # whether log-probs after a cut are wanted; servers have to be started for that

    @property
    def cuts(self) -> bool:
        """Whether tokens are drawn from less than the whole softmax."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


class Draws(NamedTuple):
    """One token a row, and what it was drawn from."""

    ids_B: Tensor  # int64
    logprobs_B: Tensor  # float32, under softmax(logits / temperature) before any cut
    drawn_logprobs_B: Tensor  # float32, under the distribution that was left; without a cut logprobs_B
    kept: KeptIds | None = None  # the ids that were left; None where `Sampling.keep_ids` or a cut is missing


def stopped_draws(logits_BV: Tensor) -> Draws:
    """In the place of tokens: every id is `STOPPED`."""
    nothing_B = logits_BV.new_zeros(len(logits_BV), dtype=torch.float32)
    return Draws(torch.full_like(nothing_B, STOPPED, dtype=torch.int64), nothing_B, nothing_B)


def uniforms(seed: int, prompt_id: str, sample: int, count: int) -> np.ndarray:
    """The noise of positions 0 ... count-1 of one response: float64 in [0, 1).

    Philox with a key hashed from (seed, prompt id, sample); the position is the counter, so a longer call begins with
    the numbers of a shorter one.
    """
    digest = hashlib.blake2b(f"{seed}|{sample}|{prompt_id}".encode(), digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def sample_tokens(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling, vocab_size: int) -> Draws:
    """Draw one token a row by inverse CDF.

    `uniform_B` float64 in [0, 1). At temperature 0 log-probs are those under softmax(logits). Ids of `vocab_size` and
    more are never drawn and have no share in the softmax. Without a cut nothing is sorted. When a row has NaN or
    infinite logits nothing is drawn: every id is `NOT_DRAWN` and every log-prob NaN.
    """
    logits_BV = logits_BV[:, :vocab_size].float()
    if sampling.temperature not in (0.0, 1.0):
        logits_BV = logits_BV / sampling.temperature
    top_B, argmax_B = logits_BV.max(-1)
    weights_BV = _blocked_exp(logits_BV, top_B)
    block_sums_BK = weights_BV.view(len(weights_BV), -1, BLOCK).sum(-1, dtype=torch.float64)
    cumulative_BK = block_sums_BK.cumsum(-1)
    if not bool(cumulative_BK[:, -1].isfinite().all()):
        nan_B = torch.full_like(top_B, torch.nan)
        return Draws(torch.full_like(argmax_B, NOT_DRAWN), nan_B, nan_B)
    total_B = cumulative_BK[:, -1]
    drawn_total_B, kept = total_B, None
    if sampling.cuts:
        ids_B, drawn_total_B, kept = _draw_truncated(weights_BV, uniform_B, total_B, sampling, vocab_size)
    elif sampling.temperature == 0:
        ids_B = argmax_B
    else:
        ids_B = _draw_blocked(weights_BV, cumulative_BK, uniform_B)
    chosen_B = (logits_BV.gather(1, ids_B[:, None])[:, 0] - top_B).double()
    return Draws(ids_B, (chosen_B - total_B.log()).float(), (chosen_B - drawn_total_B.log()).float(), kept)


def _blocked_exp(logits_BV: Tensor, top_B: Tensor) -> Tensor:
    """exp(logits - max), with zeros up to a whole number of blocks."""
    weights_BV = (logits_BV - top_B[:, None]).exp_()
    padding = -weights_BV.size(1) % BLOCK
    return F.pad(weights_BV, (0, padding)) if padding else weights_BV


def _invert(cumulative_BC: Tensor, target_B: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds the target; its own weight is never zero.

    A target that rounding has put at or above the total counts as just below it.
    """
    total_B = cumulative_BC[:, -1]
    target_B = torch.minimum(target_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    return torch.searchsorted(cumulative_BC, target_B[:, None], right=True)[:, 0]


def _draw_blocked(weights_BV: Tensor, cumulative_BK: Tensor, uniform_B: Tensor) -> Tensor:
    """Inverse CDF in two levels, block then token: a cumulative sum over the vocabulary is slow and less exact."""
    target_B = uniform_B * cumulative_BK[:, -1]
    block_B = _invert(cumulative_BK, target_B)
    before_B = F.pad(cumulative_BK, (1, 0)).gather(1, block_B[:, None])[:, 0]
    rows_B = torch.arange(len(weights_BV), device=weights_BV.device)
    inside_BC = weights_BV.view(len(weights_BV), -1, BLOCK)[rows_B, block_B].double().cumsum(-1)
    return block_B * BLOCK + _invert(inside_BC, target_B - before_B)


def _draw_truncated(
    weights_BV: Tensor, uniform_B: Tensor, total_B: Tensor, sampling: Sampling, vocab_size: int
) -> tuple[Tensor, Tensor, KeptIds | None]:
    """(ids, weight of what is kept, its ids) of a draw among what top-k and top-p keep; the likeliest always is."""
    weights_BC, ids_BC = _likeliest(weights_BV, total_B, sampling, vocab_size)
    weights_BC = weights_BC.double()
    keep_BC = weights_BC > 0
    if sampling.top_p < 1:
        before_BC = weights_BC.cumsum(-1) - weights_BC
        keep_BC &= before_BC < sampling.top_p * total_B[:, None]
        keep_BC[:, 0] = True
    cumulative_BC = (weights_BC * keep_BC).cumsum(-1)
    ids_B = ids_BC.gather(1, _invert(cumulative_BC, uniform_B * cumulative_BC[:, -1])[:, None])[:, 0]
    kept = KeptIds.counted(ids_BC[keep_BC], keep_BC.sum(-1)) if sampling.keep_ids else None
    return ids_B, cumulative_BC[:, -1], kept


def _likeliest(
    weights_BV: Tensor, total_B: Tensor, sampling: Sampling, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Weights and ids of the likeliest tokens, in falling order: `top_k` of them, or enough to hold `top_p`."""
    count = min(sampling.top_k or FIRST_CANDIDATES, vocab_size)
    while True:
        weights_BC, ids_BC = weights_BV.topk(count, sorted=True)
        if sampling.top_k or count == vocab_size:
            return weights_BC, ids_BC
        if bool((weights_BC.sum(-1, dtype=torch.float64) >= sampling.top_p * total_B).all()):
            return weights_BC, ids_BC
        count = min(8 * count, vocab_size)
