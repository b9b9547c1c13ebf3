"""`GPT`: megatron-core's GPTModel that ends at the final norm and hands hidden states on.

The LM head stays a parameter of the model under its usual name (`output_layer.weight`, or the embedding when tied), but
it is applied by whoever needs logits (`lm_head.logits_shard`), at the positions that need them: the objective at the
response tokens, the rollout engine at the last token. Student and teacher are this same class.

Shapes: T tokens of a packed microbatch, H hidden size, V padded vocabulary, TP tensor-parallel size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megatron_opd.models.architecture import Architecture, MoESettings
from megatron_opd.models.layers import local_block_spec
from megatron_opd.parallel.groups import ParallelLayout

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


class GPT(GPTModel):
    """One chunk of a decoder's layers: a pipeline stage, or one of several that a rank holds, interleaved.

    `forward` returns hidden states [T, 1, H], normed after the last chunk.

    Under sequence parallelism they are this rank's [T / TP, 1, H].
    """

    def _preprocess(self, *, padding_mask: Tensor | None = None, **inputs: Any) -> tuple[Any, ...]:
        """megatron-core's own, and every stage takes its rank's part of the mask; there only the first does."""
        *before_layers, _ = super()._preprocess(**inputs)
        if padding_mask is not None and self.config.sequence_parallel:
            group = self.pg_collection.tp
            padding_mask = padding_mask.chunk(group.size(), dim=1)[group.rank()]
        return *before_layers, padding_mask

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        del args, kwargs
        return hidden_states

    @property
    def head_weight(self) -> Tensor:
        """The LM head's shard [V / TP, H]: the embedding's when tied. Last chunk of the last stage only."""
        assert self.post_process
        return self.shared_embedding_or_output_weight() if self.tied else self.output_layer.weight

    @property
    def tied(self) -> bool:
        """Whether the LM head is the embedding."""
        return bool(self.share_embeddings_and_output_weights)

    def tie_embeddings_and_output_weights_state_dict(
        self,
        sharded_state_dict: ShardedStateDict,
        output_layer_weight_key: str,
        first_stage_word_emb_key: str,
        metadata: dict | None = None,
    ) -> None:
        """megatron-core's method with this model's own groups; the original reads a global data-parallel group."""
        if self.pre_process or not self.post_process:
            assert output_layer_weight_key not in sharded_state_dict
            return
        assert metadata is not None
        copy_of_first_stage = (1, 0, metadata["dp_cp_group"].rank())
        sharded_state_dict[output_layer_weight_key] = make_tp_sharded_tensor_for_checkpoint(
            tensor=self.head_weight,
            key=first_stage_word_emb_key,
            replica_id=copy_of_first_stage,
            allow_shape_mismatch=True,
            tp_group=self.pg_collection.tp,
            dp_cp_group=metadata["dp_cp_group"],
        )


def transformer_config(
    arch: Architecture, layout: ParallelLayout, *, precision: str = "fp32", recompute: str = "none"
) -> TransformerConfig:
    """megatron-core's config for this architecture, layout, precision ("bf16", "fp32") and recompute policy."""
    return TransformerConfig(
        **_layer_settings(arch),
        **_expert_settings(arch.moe, layout),
        **_layout_settings(layout),
        params_dtype=DTYPES[precision],
        bf16=precision == "bf16",
        fp32_residual_connection=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
        **RECOMPUTE[recompute],
    )


def _layer_settings(arch: Architecture) -> dict[str, Any]:
    _, rope_factor = arch.rope.frequencies(arch.head_dim, arch.max_positions)
    return {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "num_attention_heads": arch.num_heads,
        "num_query_groups": arch.num_kv_groups,
        "kv_channels": arch.head_dim,
        "softmax_scale": rope_factor**2 / arch.head_dim**0.5,  # the factor of queries times that of keys
        "ffn_hidden_size": arch.ffn_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_eps,
        "qk_layernorm": arch.qk_norm,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": arch.qkv_bias,
    }


def _layout_settings(layout: ParallelLayout) -> dict[str, Any]:
    interleaved = layout.virtual_pipeline > 1
    return {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline if interleaved else None,
        "context_parallel_size": layout.context,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_dtype": torch.float32,  # the residual stream is what travels between stages
        "variable_seq_lengths": layout.pipeline > 1,  # microbatches differ in length
        "moe_token_dispatcher_type": "alltoall",  # megatron-core demands it with variable lengths, MoE or not
        # Interleaved over two ranks, each is before and behind the other: megatron-core's default, sends and receives
        # in batches, then mixes up activations and gradients and says nothing.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def _expert_settings(moe: MoESettings | None, layout: ParallelLayout) -> dict[str, Any]:
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.expert_ffn_size,
        "moe_router_topk": moe.experts_per_token,
        "moe_router_pre_softmax": not moe.norm_topk_prob,  # softmax over the chosen experts sums to 1
        "moe_router_load_balancing_type": "aux_loss" if moe.aux_loss_coefficient else "none",
        "moe_aux_loss_coeff": moe.aux_loss_coefficient,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": 1,
    }


def build_gpt(
    arch: Architecture,
    layout: ParallelLayout,
    groups: ProcessGroupCollection,
    *,
    precision: str,
    padded_vocab_size: int,
    recompute: str = "none",
) -> list[GPT]:
    """This rank's model chunks in the order of their layers: one, its pipeline stage, unless they are interleaved.

    In the precision's dtype, parameters NOT yet loaded (checkpoint.weights fills them). The first rank's first chunk
    has the embedding, the last rank's last one the LM head. With tied embeddings and several stages it is collective
    over the first and last stage (megatron-core copies the embedding); otherwise it needs no communication.
    """
    config = transformer_config(arch, layout, precision=precision, recompute=recompute)
    tp_rank, pp_rank = groups.tp.rank(), groups.pp.rank()
    model_parallel_cuda_manual_seed(
        0, force_reset_rng=True, tp_rank=tp_rank, ep_rank=groups.ep.rank(), etp_rank=0
    )
    last = layout.virtual_pipeline - 1
    chunks = []
    for index in range(layout.virtual_pipeline):
        vp_stage = index if last else None
        chunk = GPT(
            config=config,
            transformer_layer_spec=local_block_spec(config, pp_rank, vp_stage),
            vocab_size=padded_vocab_size,
            max_sequence_length=arch.max_positions,
            pre_process=pp_rank == 0 and index == 0,
            post_process=pp_rank == layout.pipeline - 1 and index == last,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="rope",
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        chunk.rotary_pos_emb.inv_freq = arch.rope.frequencies(arch.head_dim, arch.max_positions)[0]
        _mark_shards(chunk)
        chunks.append(chunk)
    return chunks


def _mark_shards(model: GPT) -> None:
    """Mark the tensor-parallel weights as shards, which megatron-core does only while it initialises them.

    Without the mark all ranks but the first leave their shard out of the gradient norm: a silent error in clipping.
    Experts are marked too: what a rank holds counts there, in the expert-parallel group.

    Experts are also marked as not shared with the dense layers' data-parallel group. megatron-core does so only with
    expert parallelism; without it their gradients would miss the tokens of the other tensor-parallel ranks.
    """
    sharded_along = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in model.modules():
        dim = sharded_along.get(type(module))
        if dim is not None and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, True, dim, 1)
        if isinstance(module, SequentialMLP):
            for parameter in module.parameters():
                parameter.allreduce = False


def packed_forward(
    model: torch.nn.Module,
    tokens_T: Tensor,
    position_ids_T: Tensor,
    cu_seqlens: Tensor,
    padding_T: Tensor | None = None,
) -> Tensor:
    """Run one packed microbatch through a chunk, bare or in DDP: hidden states [T, 1, H] ([T/TP, 1, H] with SP).

    `cu_seqlens` int32 [S + 1] holds the padded segment offsets, its last entry is T; under context parallelism they
    are those of the whole microbatch and T is this rank's zigzag share of it. Routers leave the tokens of `padding_T`
    (bool) out of their balancing loss and statistics; None where neither is wanted.
    """
    longest = int(cu_seqlens.diff().max())
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    padding_mask = None if padding_T is None else padding_T[None]
    return model(
        tokens_T[None], position_ids_T[None], None, packed_seq_params=packed, padding_mask=padding_mask
    )
