"""The transformer layer: what megatron-core's local spec lacks or does differently.

Shapes: T tokens of a packed microbatch, B = 1 (megatron's batch axis), H hidden size.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_opd.models.attention import core_attention
from megatron_opd.models.router import Router


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm: input in any floating dtype, output in the weight's dtype, computed in the input's.

    It stands between the float32 residual stream and the bf16 GEMMs. `weight.sequence_parallel` makes megatron-core
    sum its gradient over the tensor-parallel ranks, which each see a part of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        weight = self.weight.to(hidden.dtype)
        return F.rms_norm(hidden, (hidden.size(-1),), weight, self.eps).to(self.weight.dtype)


def add_residual(
    training: bool, fused: bool
) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
    """megatron's "bias, dropout, add" without dropout and with the residual's dtype kept.

    megatron-core casts the residual stream down to bf16 at every layer even with `fp32_residual_connection`; keeping
    it in float32 makes bf16 log-probs several times closer to float32's at almost no cost.
    """
    del training, fused

    def add(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        assert dropout == 0.0
        output, bias = output_with_bias
        if bias is not None:
            output = output + bias
        return residual + output

    return add


def local_block_spec(
    config: TransformerConfig, pipeline_rank: int, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Layers of one model chunk: megatron-core's local spec with the parts above and `core_attention`.

    `vp_stage` counts the chunks of a rank; None: it has only one.
    """
    layer = copy.deepcopy(
        get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
        )
    )
    modules = layer.submodules
    modules.input_layernorm = modules.pre_mlp_layernorm = RMSNorm
    modules.self_attn_bda = modules.mlp_bda = add_residual
    attention = modules.self_attention.submodules
    attention.core_attention = core_attention(config.params_dtype)
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if config.num_moe_experts:
        modules.mlp.submodules.router = Router
        # The norm before experts is not fused with anything under transformer-engine either: one checkpoint for both.
        del modules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    count = get_num_layers_to_build(config, vp_stage, pipeline_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)
