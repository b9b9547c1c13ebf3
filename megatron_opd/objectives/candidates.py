"""The K best ids of a vocabulary that is sharded: every shard offers its K best, the best K of all win.

The global top-K lies in the union of the local ones, so one gather is enough. Ties go to the smaller id, which
makes the choice independent of the number of shards. Shape suffixes: N tokens, V columns of the shard, K
candidates, R ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_columns(scores_NV: Tensor, k: int) -> Tensor:
    """Columns [N, k] of the k largest scores of each row, larger first and of equal ones the smaller column."""
    width = scores_NV.shape[1]
    best = torch.topk(scores_NV, min(k + 1, width), dim=1)
    columns_NK = best.indices[:, :k].clone()
    if width > k:
        # topk breaks ties as it likes: that matters where the first column left out equals the last one taken.
        tied_N = best.values[:, k] == best.values[:, k - 1]
        if tied_N.any():
            threshold_N1 = best.values[tied_N, k - 1 : k]
            columns_NK[tied_N] = _smallest_of_tied(scores_NV[tied_N], threshold_N1, k)
    columns_NK = columns_NK.sort(dim=1).values
    order_NK = scores_NV.gather(1, columns_NK).sort(dim=1, descending=True, stable=True).indices
    return columns_NK.gather(1, order_NK)


def _smallest_of_tied(scores_NV: Tensor, threshold_N1: Tensor, k: int) -> Tensor:
    """All columns above the threshold, and of those on it the smallest, k together in each row."""
    above_NV = scores_NV > threshold_N1
    equal_NV = scores_NV == threshold_N1
    places_N1 = k - above_NV.sum(1, keepdim=True)
    taken_NV = above_NV | (equal_NV & (equal_NV.cumsum(1, dtype=torch.int32) <= places_N1))
    return taken_NV.nonzero()[:, 1].view(-1, k)


def best_of_shards(scores_RKN: Tensor, ids_RKN: Tensor, other_RKN: Tensor, k: int) -> tuple[Tensor, ...]:
    """(ids, scores, other) [N, k] of the k best candidates of all ranks; id -1 where there are fewer.

    Ranks hold ascending ranges of ids and offer equal scores in the order of their ids, so a stable sort keeps
    the smaller id first.
    """
    scores_NC = scores_RKN.flatten(0, 1).t()
    order_NK = scores_NC.sort(dim=1, descending=True, stable=True).indices[:, :k]
    scores_NK = scores_NC.gather(1, order_NK)
    ids_NK = ids_RKN.flatten(0, 1).t().gather(1, order_NK).long()
    other_NK = other_RKN.flatten(0, 1).t().gather(1, order_NK)
    return ids_NK.where(scores_NK > -torch.inf, -1), scores_NK, other_NK
