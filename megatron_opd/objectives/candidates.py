"""The K best ids of a vocabulary that is sharded: every shard offers its K best, the best K of all win.

The global top-K lies in the union of the local ones, so one gather is enough. Ties go to the smaller id, which
makes the choice independent of the number of shards. Shape suffixes: N tokens, V columns of the shard, K
candidates, R ranks, P pairs of row and column, G groups of columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

FOLD = 16  # columns of a group


def top_columns(scores_NV: Tensor, k: int) -> Tensor:
    """Columns [N, k] of the k largest scores of each row, larger first and of equal ones the smaller column."""
    width = scores_NV.shape[1]
    values_NK, columns_NK = _largest(scores_NV, min(k + 1, width))
    columns_NK = columns_NK[:, :k].clone()
    if width > k:
        # topk breaks ties as it likes: that matters where the first column left out equals the last one taken.
        # Of columns that are excluded (-inf) it does not matter: they are no candidates.
        tied_N = (values_NK[:, k] == values_NK[:, k - 1]) & (values_NK[:, k] != -torch.inf)
        if tied_N.any():
            threshold_N1 = values_NK[tied_N, k - 1 : k]
            columns_NK[tied_N] = _smallest_of_tied(scores_NV[tied_N], threshold_N1, k)
    columns_NK = columns_NK.sort(dim=1).values
    order_NK = scores_NV.gather(1, columns_NK).sort(dim=1, descending=True, stable=True).indices
    return columns_NK.gather(1, order_NK)


def _largest(scores_NV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and columns [N, count] of the largest scores, in descending order.

    Wide rows are folded first: the largest scores lie in the groups of columns with the largest maxima, and a
    maximum is cheaper than a selection.
    """
    width, folded = scores_NV.shape[1], scores_NV.shape[1] // FOLD
    if folded < FOLD * count:
        return torch.topk(scores_NV, count, dim=1)
    maxima_NG = scores_NV[:, : FOLD * folded].unflatten(1, (FOLD, folded)).amax(1)
    groups_NK1 = torch.topk(maxima_NG, count, dim=1).indices[:, :, None]
    members_NC = (groups_NK1 + folded * torch.arange(FOLD, device=scores_NV.device)).flatten(1)
    rest_C = torch.arange(FOLD * folded, width, device=scores_NV.device)
    columns_NC = torch.cat([members_NC, rest_C.expand(scores_NV.shape[0], -1)], 1)
    best = torch.topk(scores_NV.gather(1, columns_NC), count, dim=1)
    return best.values, columns_NC.gather(1, best.indices)


def _smallest_of_tied(scores_NV: Tensor, threshold_N1: Tensor, k: int) -> Tensor:
    """All columns above the threshold, and of those on it the smallest, k together in each row."""
    rows_P, columns_P = (scores_NV >= threshold_N1).nonzero(as_tuple=True)  # pairs, row after row
    tied_P = scores_NV[rows_P, columns_P] == threshold_N1[rows_P, 0]
    above_N = torch.zeros_like(threshold_N1[:, 0], dtype=torch.int64).index_add_(0, rows_P, (~tied_P).long())
    ties_N = torch.zeros_like(above_N).index_add_(0, rows_P, tied_P.long())
    place_P = tied_P.cumsum(0) - (ties_N.cumsum(0) - ties_N)[rows_P]  # 1 for the first of a row's ties
    return columns_P[~tied_P | (place_P <= k - above_N[rows_P])].view(-1, k)


def best_of_shards(
    scores_RKN: Tensor, ids_RKN: Tensor, other_RKN: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(ids, scores, other) [N, k] of the k best candidates of all ranks; -1 and -inf where there are fewer.

    Candidates of score -inf are none: an id that the choosing model excludes is never among the best.
    Ranks hold ascending ranges of ids and offer equal scores in the order of their ids, so a stable sort keeps
    the smaller id first.
    """
    scores_NC = scores_RKN.flatten(0, 1).t()
    order_NK = scores_NC.sort(dim=1, descending=True, stable=True).indices[:, :k]
    scores_NK = scores_NC.gather(1, order_NK)
    ids_NK = ids_RKN.flatten(0, 1).t().gather(1, order_NK).long()
    present_NK = scores_NK != -torch.inf  # NaN is present: it must stay visible
    ids_NK = ids_NK.where(present_NK, -1)
    if other_RKN is None:
        return ids_NK, scores_NK, None
    other_NK = other_RKN.flatten(0, 1).t().gather(1, order_NK)
    return ids_NK, scores_NK, other_NK.where(present_NK, -torch.inf)
