"""Qwen3-MoE (Qwen3-30B-A3B, ...): Qwen3 whose layers have a router and experts, without shared experts."""

from megatron_opd.models.families.rows import (
    ATTENTION,
    FIRST,
    LAST,
    MLP_NORM,
    QK_NORMS,
    Family,
    layer_row,
)

# fmt: off
_EXPERTS = (
    layer_row("mlp.router.weight", "direct", "replicated", {"mlp.gate.weight": "experts hidden"}),
    layer_row("mlp.experts.local_experts.{expert}.linear_fc1.weight", "gate_up", "replicated", {
        "mlp.experts.{expert}.gate_proj.weight": "expert_ffn hidden",
        "mlp.experts.{expert}.up_proj.weight": "expert_ffn hidden",
    }),
    layer_row("mlp.experts.local_experts.{expert}.linear_fc2.weight", "direct", "replicated", {
        "mlp.experts.{expert}.down_proj.weight": "hidden expert_ffn",
    }),
)
# fmt: on

FAMILY = Family("qwen3_moe", (FIRST, *ATTENTION, *QK_NORMS, MLP_NORM, *_EXPERTS, *LAST))
