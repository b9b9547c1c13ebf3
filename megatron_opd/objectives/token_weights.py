"""Weight of each response token in the loss, from the log-gaps of the tokens before it.

Shape suffix: N positions of a packed buffer (or of a single response).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_opd.objectives.scan import segmented_prefix_sums

TOKEN_WEIGHT_KINDS = ("uniform", "cumulative_share")


def token_weights(
    log_gap_N: Tensor,
    mask_N: Tensor,
    cu_seqlens: Tensor,
    *,
    kind: str = "cumulative_share",
    gamma: float = 0.5,
    unit_mean: bool = False,
) -> Tensor:
    """Detached weights [N], float32 (float64 for float64 gaps), 0 where mask_N is False.

    "uniform": 1. "cumulative_share" (IW-OPD, arXiv 2606.22600, App. C.3, Eq. 17):

        w_t = 1 + gamma * (1 - sum_{k<t} |A_k| / sum_k |A_k|)

    with A = log p_teacher - log p_student of the sampled token (`log_gap_N`) and both sums over the unmasked
    tokens of the response. The first unmasked token has w = 1 + gamma, and w falls towards 1. A response
    whose gaps are all 0, or that has one token, has w = 1 + gamma throughout (the convention of the authors'
    code).

    Responses are the segments of cu_seqlens [S + 1], which ends at N; masked positions within them (prompt,
    padding) may hold anything, NaN included. unit_mean divides the weights by their mean over the response's
    unmasked tokens, which takes out the change of scale and leaves the shape.

    ValueError: unknown kind, negative gamma, shapes that do not agree.
    """
    if kind not in TOKEN_WEIGHT_KINDS:
        raise ValueError(f"unknown token weight kind {kind!r}; supported: {', '.join(TOKEN_WEIGHT_KINDS)}")
    if not gamma >= 0.0:
        raise ValueError(f"gamma must not be negative: {gamma}")
    if log_gap_N.dim() != 1 or mask_N.shape != log_gap_N.shape:
        shapes = f"{tuple(log_gap_N.shape)} and {tuple(mask_N.shape)}"
        raise ValueError(f"log_gap and mask must both have shape [N], not {shapes}")
    mask_N = mask_N.bool()
    dtype = torch.float64 if log_gap_N.dtype == torch.float64 else torch.float32
    if kind == "uniform":
        return mask_N.to(dtype)
    magnitude_N = log_gap_N.detach().double().abs().where(mask_N, 0.0)
    scan = segmented_prefix_sums(magnitude_N, cu_seqlens)
    share_N = (scan.exclusive_N / scan.total_N).masked_fill(scan.total_N == 0, 0.0)
    weights_N = (1.0 + gamma * (1.0 - share_N)).where(mask_N, 0.0)
    if unit_mean:
        tokens_N = segmented_prefix_sums(mask_N, cu_seqlens).total_N
        weights_N = weights_N * (tokens_N / segmented_prefix_sums(weights_N, cu_seqlens).total_N)
        weights_N = weights_N.where(mask_N, 0.0)  # a response without unmasked tokens had 0 / 0
    return weights_N.to(dtype)
