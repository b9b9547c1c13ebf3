"""Small random models of every family for the pruning tools, and what plain transformers makes of a folder."""

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_opd.checkpoint.hf_import import HfReader, check_hf_weights
from megatron_opd.models.architecture import read_architecture

CONFIGS: dict[str, tuple[type[PretrainedConfig], dict]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 12}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}
DENSE = [family for family in CONFIGS if family != "qwen3_moe"]
IDS = torch.arange(20).view(2, 10)


def save_model(folder, family="llama", *, layers=6, tied=True, change=None, settings=None, **save_options):
    """Write a random model with 4 heads in 2 groups, after `change(model)`; returns it."""
    config_class, extra = CONFIGS[family]
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
    }
    model = AutoModelForCausalLM.from_config(config_class(**{**sizes, **extra, **(settings or {})})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts them at 0
                parameter.normal_(std=0.5)
        if change is not None:
            change(model)
    model.save_pretrained(folder, **save_options)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def load_whole(folder):
    """The folder in transformers, after making sure that neither it nor the converter misses anything."""
    check_hf_weights(HfReader(folder), read_architecture(folder))
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()
