"""Which positions of a packed microbatch a context-parallel rank holds, and the way back to the whole.

Megatron's zigzag: with R ranks every segment is cut into 2R equal chunks, and rank r holds the chunks r and
2R - 1 - r of every segment, segment after segment, so that causal attention costs every rank the same.

Shape suffixes: T positions of the packed microbatch, L = T / R of them on each of R ranks, C rows, P pieces
(two for each segment).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def zigzag_positions(cu_seqlens: Tensor, rank: int, ranks: int) -> Tensor:
    """Positions of the packed microbatch that `rank` of `ranks` holds, in its order: [L] int64.

    cu_seqlens [S + 1] are the offsets of the whole microbatch, padding included; the positions are on its
    device. One rank holds every position, whatever the lengths. ValueError if a segment's length is not
    divisible by 2 * ranks, for cu_seqlens that are no offsets, or for a rank that does not exist.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"there is no rank {rank} among {ranks} context-parallel ranks")
    offsets = cu_seqlens.to(torch.int64)
    lengths_S = offsets.diff()
    if offsets.numel() == 0 or offsets[0] != 0 or (lengths_S < 0).any():
        raise ValueError(f"cu_seqlens must start at 0 and not decrease: {offsets.tolist()}")
    if ranks == 1:
        return torch.arange(int(offsets[-1]), device=offsets.device)
    if (lengths_S % (2 * ranks) != 0).any():
        raise ValueError(
            f"the length of every packed segment must be divisible by 2 * {ranks} context-parallel ranks: "
            f"{lengths_S.tolist()}"
        )
    chunk_S = lengths_S // (2 * ranks)
    starts_S2 = offsets[:-1, None] + chunk_S[:, None] * chunk_S.new_tensor([rank, 2 * ranks - 1 - rank])
    chunk_P = chunk_S.repeat_interleave(2)
    shift_P = starts_S2.flatten() - (chunk_P.cumsum(0) - chunk_P)
    shift_L = shift_P.repeat_interleave(chunk_P)
    return shift_L + torch.arange(len(shift_L), device=offsets.device)


def gather_sequence(values_CL: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The whole microbatch [C, T], in sequence order, on every rank, from each rank's zigzag shard [C, L].

    One all-gather of values_CL, in its dtype, bit for bit; detached. Without a group, or in a group of one
    rank, values_CL is returned as it is and nothing is communicated. ValueError, before any communication, if
    the segments of cu_seqlens [S + 1] cannot be cut, or if L is not this rank's share of them.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    if ranks == 1:
        return values_CL
    rows, count = values_CL.shape
    order_T = torch.cat([zigzag_positions(cu_seqlens, rank, ranks) for rank in range(ranks)])
    if count * ranks != len(order_T):
        raise ValueError(
            f"cu_seqlens ends at {len(order_T)}, but {ranks} context-parallel ranks with {count} positions "
            f"each hold {count * ranks}"
        )
    gathered_RCL = values_CL.new_empty(ranks, rows, count)
    dist.all_gather_into_tensor(
        gathered_RCL.view(ranks * rows, count), values_CL.detach().contiguous(), group=group
    )
    whole_CT = values_CL.new_empty(rows, ranks * count)
    whole_CT[:, order_T.to(values_CL.device)] = gathered_RCL.transpose(0, 1).reshape(rows, -1)
    return whole_CT
