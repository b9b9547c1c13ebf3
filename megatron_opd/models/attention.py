"""Causal attention of packed sequences, each whole on this rank or shared by context-parallel ranks.

Shapes: T tokens of a packed microbatch, L = T / R of them on each of R context-parallel ranks, S segments, C tokens of
the longest chunk, K keys that a chunk sees, A query heads and G key/value groups on this rank, D head size.
"""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_opd.objectives.context_parallel import zigzag_positions


class PackedAttention(torch.nn.Module):
    """Core attention of packed (THD) sequences on torch's scaled_dot_product_attention.

    Takes query [L, A, D], key and value [L, G, D] and `packed_seq_params.cu_seqlens_q`, the offsets of the whole
    microbatch; every segment attends to itself, causally. Under context parallelism these are this rank's zigzag share
    (`objectives.context_parallel`): keys and values of all ranks are gathered, and each of the rank's two chunks of a
    segment attends to the segment up to the chunk's end. The same chunks of all segments are padded to the longest
    and attended to in one call. Stands in for transformer-engine's DotProductAttention where that is not used.

    Collectives over `pg_collection.cp` (none with one rank): 1 all-gather [L, G, 2 D] forward, 1 reduce-scatter
    of as much backward, in the inputs' dtype. Kept for the backward pass (padded to equal lengths; float32 on a CPU):
    the query, the output and A log-normalisers of L tokens; keys and values up to the end of the rank's last chunk,
    all T tokens at most; for each chunk but a segment's first a mask of S * C * K numbers of the query's dtype.
    """

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        del config
        super().__init__()
        self.softmax_scale = softmax_scale
        self.cp_group = None if pg_collection is None else pg_collection.cp

    def forward(
        self,
        query_LAD: Tensor,
        key_LGD: Tensor,
        value_LGD: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> Tensor:
        """Returns [L, A * D]."""
        assert attention_mask is None, "packed attention is causal within each segment"
        cu_seqlens = packed_seq_params.cu_seqlens_q
        ranks, rank = (1, 0) if self.cp_group is None else (self.cp_group.size(), self.cp_group.rank())
        chunks = [0] if ranks == 1 else [rank, 2 * ranks - 1 - rank]
        cuts = ranks * len(chunks)  # equal pieces of a segment
        starts_S, chunk_S = cu_seqlens[:-1], cu_seqlens.diff() // cuts
        longest = packed_seq_params.max_seqlen_q // cuts
        offsets_C = torch.arange(longest, device=query_LAD.device)
        offsets_K = torch.arange((chunks[-1] + 1) * longest, device=query_LAD.device)

        whole = self._of_all_ranks(key_LGD, value_LGD, cu_seqlens)
        key_SGKD, value_SGKD = (_padded(x_TGD, starts_S[:, None] + offsets_K) for x_TGD in whole)
        outputs = []
        for number, chunk in enumerate(chunks):
            mine_S = starts_S // ranks + number * chunk_S  # where the chunk begins among this rank's tokens
            seen = (chunk + 1) * longest
            visible_S1CK = None
            if chunk > 0:
                position_SC = chunk * chunk_S[:, None] + offsets_C
                visible_S1CK = (offsets_K[:seen] <= position_SC[:, :, None])[:, None]
            out_SACD = F.scaled_dot_product_attention(
                _padded(query_LAD, mine_S[:, None] + offsets_C),
                key_SGKD[:, :, :seen],
                value_SGKD[:, :, :seen],
                attn_mask=visible_S1CK,
                is_causal=visible_S1CK is None,
                scale=self.softmax_scale,
                enable_gqa=True,
            )
            outputs.append(out_SACD.transpose(1, 2))
        inside_SL = (offsets_C < chunk_S[:, None]).repeat(1, len(chunks))
        return torch.cat(outputs, 1)[inside_SL].flatten(1).to(query_LAD.dtype)

    def _of_all_ranks(self, key_LGD: Tensor, value_LGD: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole microbatch, [T, G, D] in the sequence's order; gradients come back summed."""
        if self.cp_group is None or self.cp_group.size() == 1:
            return key_LGD, value_LGD
        ranks = self.cp_group.size()
        shares = gather_from_sequence_parallel_region(
            torch.cat((key_LGD, value_LGD), -1), group=self.cp_group
        )
        positions = torch.cat([zigzag_positions(cu_seqlens, rank, ranks) for rank in range(ranks)])
        key_TGD, value_TGD = shares.index_select(0, positions.argsort()).chunk(2, -1)
        return key_TGD, value_TGD


def _padded(x: Tensor, index_SC: Tensor) -> Tensor:
    """[L, A, D] at these positions, what lies beyond the end filled with anything: [S, A, C, D].

    On a CPU attention runs in float32 whatever the inputs: faster there than bf16 (1.7 times, backward included), and
    closer.
    """
    x_SACD = x[index_SC.clamp(max=x.size(0) - 1)].transpose(1, 2)
    return x_SACD.float() if x.device.type == "cpu" else x_SACD


def uses_transformer_engine(dtype: torch.dtype) -> bool:
    """Whether attention is transformer-engine's: installed, on a GPU, in bf16 (it lacks packed float32)."""
    installed = find_spec("transformer_engine") is not None
    return installed and torch.cuda.is_available() and dtype is torch.bfloat16


def core_attention(dtype: torch.dtype) -> type[torch.nn.Module]:
    """The core attention of a model in `dtype`.

    Where transformer-engine is used it is megatron-core's TEDotProductAttention, which takes the same packed inputs
    and zigzag shares and does context parallelism itself. That path HAS NOT BEEN RUN by this project's tests: it needs
    a GPU.
    """
    if not uses_transformer_engine(dtype):
        return PackedAttention
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention
