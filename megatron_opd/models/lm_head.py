"""Hidden states -> this rank's shard of the logits, at chosen positions.

Shapes: T tokens of a microbatch, N chosen positions, H hidden size, V padded vocabulary, TP tensor-parallel size.
"""

import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor


def select_positions(
    hidden_T1H: Tensor, positions_N: Tensor, *, group: dist.ProcessGroup, sequence_parallel: bool
) -> Tensor:
    """The hidden states [N, H] at `positions_N` (indices into T), complete on every tensor-parallel rank.

    Their gradient arrives as one part per rank (each rank's vocabulary shard); the backward sums the parts:
    without sequence parallelism 0 collectives forward and 1 all-reduce [N, H] backward, with it 1 all-gather
    [T, H] forward and 1 reduce-scatter [T, H] backward. With one rank there are none.
    """
    if sequence_parallel:
        full_T1H = gather_from_sequence_parallel_region(
            hidden_T1H, tensor_parallel_output_grad=True, group=group
        )
        return full_T1H[:, 0].index_select(0, positions_N)
    return copy_to_tensor_model_parallel_region(hidden_T1H[:, 0].index_select(0, positions_N), group=group)


def logits_shard(hidden_NH: Tensor, head_weight_VH: Tensor) -> Tensor:
    """Logits [N, V/TP] of this rank's vocabulary rows, in the weight's dtype; the weight is an autograd input."""
    return F.linear(hidden_NH.to(head_weight_VH.dtype), head_weight_VH)
