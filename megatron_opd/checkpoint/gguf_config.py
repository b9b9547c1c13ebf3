"""What the metadata of a GGUF file says about a model, as a Hugging Face config.

Transformers reads such metadata too, but passes over what would make another model of it: RoPE scaling (in the
metadata or, for Llama 3.1 and later, as a tensor of factors), sizes of heads and experts that are not the family's
defaults, and sliding windows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from megatron_opd.errors import UserError
from megatron_opd.models.rope import RopeSettings, read_rope

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}
"""GGUF architecture -> Hugging Face model_type. Mistral's files say `llama`."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_TOKEN_IDS = {"bos": "bos", "eos": "eos", "padding": "pad"}  # GGUF's name -> Hugging Face's


@dataclass(frozen=True)
class GgufMetadata:
    """The metadata of a file, `value(key)` or None, and the shapes of its tensors (rows first)."""

    where: str
    value: Callable[[str], Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        """`general.architecture`. Raises UserError when it is not one of `MODEL_TYPES`."""
        found = self.value("general.architecture")
        if found not in MODEL_TYPES:
            known = ", ".join(MODEL_TYPES)
            raise UserError(f"{self.where}: GGUF architecture '{found}' is not supported; supported: {known}")
        return found

    def of_model(self, key: str, default: Any = None) -> Any:
        """The model's own value of `key`; UserError when there is neither one nor a default."""
        name = f"{self.architecture}.{key}"
        value = self.value(name)
        if value is None and default is None:
            raise UserError(f"{self.where} lacks the metadata key {name}")
        return default if value is None else value


def read_gguf_config(metadata: GgufMetadata, rope_factors: Tensor | None, dtype: str) -> PretrainedConfig:
    """The config; `rope_factors` is the file's tensor `rope_freqs.weight`, `dtype` what the weights will have.

    Raises UserError for an architecture, RoPE scaling or setting that is not supported.
    """
    settings = _model_type(metadata)
    settings |= _sizes(metadata)
    settings |= _experts(metadata)
    settings |= token_ids(metadata)
    settings["rope_parameters"] = _rope(metadata, rope_factors, settings["head_dim"])
    read_rope(settings, metadata.where)  # says in one line what transformers' config says with a traceback
    config = AutoConfig.for_model(**settings, dtype=dtype)
    config.architectures = [_class_name(settings["model_type"])]
    return config


def token_ids(metadata: GgufMetadata) -> dict[str, int]:
    """`bos_token_id`, `eos_token_id`, `pad_token_id` as far as the file has them; padding defaults to the end."""
    found = {
        f"{name}_token_id": metadata.value(f"tokenizer.ggml.{key}_token_id")
        for key, name in _TOKEN_IDS.items()
    }
    ids = {name: int(value) for name, value in found.items() if value is not None}
    if "eos_token_id" in ids:
        ids.setdefault("pad_token_id", ids["eos_token_id"])
    return ids


def _class_name(model_type: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]


def _sizes(metadata: GgufMetadata) -> dict[str, Any]:
    if "token_embd.weight" not in metadata.shapes:
        raise UserError(f"{metadata.where} lacks the tensor token_embd.weight")
    hidden, heads = metadata.of_model("embedding_length"), metadata.of_model("attention.head_count")
    groups = metadata.of_model("attention.head_count_kv", heads)
    if isinstance(heads, list) or isinstance(groups, list):
        raise UserError(f"{metadata.where}: layers with different numbers of heads are not supported")
    head_dim = metadata.of_model("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.of_model(key, head_dim) != head_dim:
            raise UserError(f"{metadata.where}: {key} other than the size of a head is not supported")
    rms_eps = metadata.of_model("attention.layer_norm_rms_epsilon")
    return {
        "vocab_size": metadata.shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": metadata.of_model(
            "feed_forward_length", metadata.of_model("expert_feed_forward_length", 0)
        ),
        "num_hidden_layers": metadata.of_model("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "rms_norm_eps": _decimal(rms_eps),
        "max_position_embeddings": metadata.of_model("context_length"),
        "tie_word_embeddings": "output.weight" not in metadata.shapes,
    }


def _model_type(metadata: GgufMetadata) -> dict[str, Any]:
    """The model_type, and a sliding window where there is one (the architecture's reader judges it)."""
    model_type = MODEL_TYPES[metadata.architecture]
    window = metadata.of_model("attention.sliding_window", 0) or None
    name = str(metadata.value("general.name") or "").lower()
    if model_type == "llama" and (window or "mistral" in name):
        return {"model_type": "mistral", "sliding_window": window}
    if window:
        return {"model_type": model_type, "sliding_window": window, "use_sliding_window": True}
    return {"model_type": model_type}


def _experts(metadata: GgufMetadata) -> dict[str, Any]:
    if metadata.architecture != "qwen3moe":
        if metadata.of_model("expert_count", 0):
            raise UserError(
                f"{metadata.where}: experts are supported in files of architecture qwen3moe only, this one is "
                f"{metadata.architecture}"
            )
        return {}
    return {
        "num_experts": metadata.of_model("expert_count"),
        "num_experts_per_tok": metadata.of_model("expert_used_count"),
        "moe_intermediate_size": metadata.of_model("expert_feed_forward_length"),
        "norm_topk_prob": bool(
            metadata.of_model("expert_weights_norm", True)
        ),  # llama.cpp's rule for Qwen3-MoE
    }


def _rope(metadata: GgufMetadata, factors: Tensor | None, head_dim: int) -> dict[str, Any]:
    theta = float(metadata.of_model("rope.freq_base", 10000.0))
    kind = metadata.of_model("rope.scaling.type", "none")
    if factors is not None:
        if kind != "none":
            raise UserError(
                f"{metadata.where}: RoPE scaling '{kind}' with rope_freqs.weight is not supported"
            )
        return _llama3(factors, theta, head_dim, metadata)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    factor = _decimal(metadata.of_model("rope.scaling.factor"))
    given = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"):
        if metadata.value(f"{metadata.architecture}.rope.scaling.{key}") is not None:
            raise UserError(f"{metadata.where}: rope.scaling.{key} is not supported")
    if kind == "yarn":
        given["original_max_position_embeddings"] = metadata.of_model("rope.scaling.original_context_length")
        for key in ("beta_fast", "beta_slow"):
            value = metadata.of_model(f"rope.scaling.yarn_{key}", 0.0)
            given |= {key: _decimal(value)} if value else {}
    return given


def _llama3(factors: Tensor, theta: float, head_dim: int, metadata: GgufMetadata) -> dict[str, Any]:
    """Llama 3.1's scaling from the divisors of the frequencies that it led to.

    The file holds the divisors only. With the numbers that all Llama 3 models share, the largest divisor is the
    scaling factor; the others tell whether those were the numbers.
    """
    factor = _decimal(float(factors.max()))
    numbers = {"factor": factor, **_LLAMA3}
    scaled, _ = RopeSettings(theta, "llama3", numbers).frequencies(head_dim, 0)
    plain, _ = RopeSettings(theta).frequencies(head_dim, 0)
    if factors.shape != plain.shape or not torch.allclose(plain / scaled, factors, rtol=1e-4):
        raise UserError(f"{metadata.where}: rope_freqs.weight is not the RoPE scaling of Llama 3")
    return {"rope_type": "llama3", "rope_theta": theta, **numbers}


def _decimal(value: float) -> float:
    """GGUF holds float32: 9.9999997e-06 stands for 1e-05."""
    return float(f"{value:.6g}")
