"""Weight of each response token in the loss: from the log-gaps before it, or from its place.

Shape suffixes: T positions of a packed buffer (or of a single response), L = T / CP of them on this
context-parallel rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.objectives.context_parallel import gather_sequence, zigzag_positions
from megatron_opd.objectives.scan import segmented_prefix_sums

# Every kind, with the settings of TokenWeight that it reads.
TOKEN_WEIGHT_FIELDS: dict[str, tuple[str, ...]] = {
    "uniform": (),
    "cumulative_share": ("gamma", "floor", "unit_mean", "signed"),
    "prefix_ratio": ("gamma", "floor", "unit_mean", "alpha", "clip"),
    "prefix_window": ("gamma", "floor", "unit_mean", "fraction"),
    "suffix_window": ("gamma", "floor", "unit_mean", "fraction"),
    "curriculum": ("gamma", "floor", "unit_mean", "fraction"),
    "linear_decay": ("gamma", "floor", "unit_mean"),
    "increasing": ("gamma", "floor", "unit_mean"),
}
TOKEN_WEIGHT_KINDS = tuple(TOKEN_WEIGHT_FIELDS)


@dataclass(frozen=True)
class TokenWeight:
    """Settings of `token_weights`, which says what they mean. ValueError for values that do not exist."""

    kind: str = "uniform"
    gamma: float = 0.5
    floor: float = 1.0
    signed: bool = False
    alpha: float = 0.1
    clip: float = 10.0
    fraction: float = 0.3
    unit_mean: bool = False

    def __post_init__(self) -> None:
        if self.kind not in TOKEN_WEIGHT_KINDS:
            raise ValueError(
                f"unknown token weight kind {self.kind!r}; supported: {', '.join(TOKEN_WEIGHT_KINDS)}"
            )
        for name in ("gamma", "floor", "alpha"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative and must be finite: {getattr(self, name)}")
        if not 0.0 < self.clip < math.inf:
            raise ValueError(f"clip must be finite and positive: {self.clip}")
        if not 0.0 <= self.fraction <= 1.0:
            raise ValueError(f"fraction must lie in [0, 1], not {self.fraction}")


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
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Detached weights w_t = floor + gamma * s_t [L], float32 (float64 for float64 gaps), 0 where masked.

    With A = log p_teacher - log p_student of the sampled token (`log_gap`), n the unmasked tokens of the
    response and i = 0 ... n - 1 the place among them (all sums are over unmasked tokens):

        uniform           w = 1, whatever gamma and floor are
        cumulative_share  s = 1 - sum_{k<t} |A_k| / sum_k |A_k|     IW-OPD (arXiv 2606.22600, App. C.3, Eq. 17)
                          signed: without | |, s clamped to [0, 1]; it may rise again where A changes sign
        prefix_ratio      s = min(exp(alpha * sum_{k<t} A_k), clip) the paper's ideal weight r_t^alpha, Prop. 1,
                          without its normaliser Z, an expectation that one rollout does not give
        prefix_window     s = 1 for the first ceil(fraction * n) tokens, else 0
        suffix_window     s = 1 for the last ceil(fraction * n) tokens, else 0
        curriculum        prefix_window with fraction + (1 - fraction) * (1 - cos(pi * progress)) / 2
        linear_decay      s = 1 - i / n
        increasing        s = (i + 1) / n

    The total of cumulative_share runs over all n tokens, as in the authors' code (Eq. 17 leaves out the last
    one), without the 1e-8 that the code adds: the unsigned weight does not depend on the scale of the gaps.
    floor = 0 keeps s alone: a window then masks. fraction * n is rounded to nine decimals before the ceil,
    so that 7 % of 100 tokens are 7. progress, in [0, 1], is how much of the training is done. unit_mean
    divides the weights by their mean over the response's unmasked tokens: the shape without the change of
    scale.

    Responses are the segments of cu_seqlens [S + 1], which ends at T. Masked positions (prompt, special
    tokens, padding) may hold anything, NaN included. Responses do not see each other.

    Degenerate cases. One token: s = 1 (prefix_ratio min(1, clip); fraction 0: s = 0 in the windows). All gaps
    0: s = 1 for cumulative_share. A signed total of 0: s is 0 behind a positive prefix sum, else 1, the limit
    from above. All masked, or no tokens: only zeros, an empty result. Weights that are all 0 stay 0 under
    unit_mean. A gap that is not finite at an unmasked position: NaN for all unmasked tokens of that response,
    in the two kinds that read gaps.

    Context parallelism: log_gap and mask are this rank's zigzag shard (`zigzag_positions`), cu_seqlens
    the offsets of the whole. One all-gather of both, 2 * T numbers, then every rank weighs whole responses
    and keeps its own positions: the same bits as without sharding, with one collective for every kind and
    for unit_mean. None for uniform, without a group or in a group of one rank; none backward.

    ValueError: settings that do not exist, shapes that do not agree, segments that cannot be cut.
    """
    setting = TokenWeight(
        kind=kind,
        gamma=gamma,
        floor=floor,
        signed=signed,
        alpha=alpha,
        clip=clip,
        fraction=fraction,
        unit_mean=unit_mean,
    )
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must lie in [0, 1], not {progress}")
    if log_gap.dim() != 1 or mask.shape != log_gap.shape:
        shapes = f"{tuple(log_gap.shape)} and {tuple(mask.shape)}"
        raise ValueError(f"log_gap and mask must have one and the same shape [N], not {shapes}")
    mask_L, log_gap_L = mask.bool(), log_gap.detach()
    dtype = torch.float64 if log_gap_L.dtype == torch.float64 else torch.float32
    if kind == "uniform":
        return mask_L.to(dtype)
    cu_seqlens = cu_seqlens.cpu()  # the scans and the gather each look at it from the host
    gap_T, mask_T = gather_sequence(torch.stack([log_gap_L, mask_L.to(log_gap_L.dtype)]), cu_seqlens, group)
    mask_T = mask_T != 0
    shape_T = _shape(setting, gap_T.where(mask_T, 0.0), mask_T, cu_seqlens, progress)
    weights_T = (floor + gamma * shape_T).where(mask_T, 0.0)
    if unit_mean:
        weights_T = _over_mean(weights_T, mask_T, cu_seqlens).where(mask_T, 0.0)
    if group is not None:
        positions_L = zigzag_positions(cu_seqlens, dist.get_rank(group), dist.get_world_size(group))
        weights_T = weights_T[positions_L.to(weights_T.device)]
    return weights_T.to(dtype)


def _shape(
    setting: TokenWeight, gap_T: Tensor, mask_T: Tensor, cu_seqlens: Tensor, progress: float
) -> Tensor:
    """s_t of every kind but uniform, float64; masked positions hold anything. gap_T is 0 where masked."""
    if setting.kind == "cumulative_share":
        before_T, total_T = _gap_sums(gap_T if setting.signed else gap_T.abs(), cu_seqlens)
        share_T = (before_T / total_T).masked_fill((before_T == 0) & (total_T == 0), 0.0)
        return (1.0 - share_T).clamp(0.0, 1.0)
    if setting.kind == "prefix_ratio":
        before_T, _ = _gap_sums(gap_T, cu_seqlens)
        return (setting.alpha * before_T).clamp(max=math.log(setting.clip)).exp()
    index_T, count_T = segmented_prefix_sums(mask_T, cu_seqlens)
    if setting.kind == "linear_decay":
        return 1.0 - index_T / count_T
    if setting.kind == "increasing":
        return (index_T + 1.0) / count_T
    fraction = setting.fraction
    if setting.kind == "curriculum":
        fraction += (1.0 - fraction) * (1.0 - math.cos(math.pi * progress)) / 2.0
    width_T = (fraction * count_T).round(decimals=9).ceil()
    inside_T = index_T >= count_T - width_T if setting.kind == "suffix_window" else index_T < width_T
    return inside_T.double()


def _gap_sums(gap_T: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Prefix sums and totals, where a response with a gap that is not finite has NaN for its prefix sums."""
    before_T, total_T = segmented_prefix_sums(gap_T, cu_seqlens)
    return before_T.where(total_T.isfinite(), torch.nan), total_T


def _over_mean(weights_T: Tensor, mask_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """weights_T, 0 where masked, over their mean within each response; those of sum 0 stay 0."""
    total_T = segmented_prefix_sums(weights_T, cu_seqlens).total_T
    count_T = segmented_prefix_sums(mask_T, cu_seqlens).total_T
    return weights_T * (count_T / total_T).masked_fill(total_T == 0, 0.0)
