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

    Their gradient has to come back complete, summed over the vocabulary shards: `logits_shard` and
    `linear_divergence` see to that. With sequence parallelism 1 all-gather [T, H] forward; 0 collectives otherwise
    and backward.
    """
    if sequence_parallel:
        hidden_T1H = gather_from_sequence_parallel_region(
            hidden_T1H, tensor_parallel_output_grad=False, group=group
        )
    return hidden_T1H[:, 0].index_select(0, positions_N)


def logits_shard(hidden_NH: Tensor, head_weight_VH: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Logits [N, V/TP] of this rank's vocabulary rows, in the weight's dtype; the weight is an autograd input.

    0 collectives forward; backward 1 all-reduce [N, H] that completes the gradient of the hidden states, none with
    one rank.
    """
    hidden_NH = copy_to_tensor_model_parallel_region(hidden_NH, group=group)
    return F.linear(hidden_NH.to(head_weight_VH.dtype), head_weight_VH)
