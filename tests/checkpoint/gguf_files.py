"""Writes small models as GGUF files, the way llama.cpp's converter does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from transformers import PreTrainedModel

from tests.checkpoint.models import hf_model

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
Q = gguf.GGMLQuantizationType


def write_gguf(
    path: Path,
    hf_folder: Path,
    *,
    quantised: gguf.GGMLQuantizationType | None = None,
    change: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
    tensors: Callable[[dict[str, numpy.ndarray]], object] = lambda tensors: None,
) -> Path:
    """The model of a folder as GGUF: float32, MLP matrices `quantised`; `change` and `tensors` may spoil it."""
    model = hf_model(hf_folder)
    config: Any = model.config
    writer = gguf.GGUFWriter(str(path), ARCHITECTURES[config.model_type])
    _add_config(writer, config)
    _add_tokenizer(writer, config.vocab_size)
    change(writer)
    arrays = gguf_arrays(model)
    tensors(arrays)
    for name, array in arrays.items():
        if quantised is not None and "ffn" in name and "norm" not in name:
            writer.add_tensor(name, gguf.quantize(array, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_config(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_name(f"tiny {config.model_type}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    tokens = ["<unk>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"]
    tokens += [f"<{index}>" for index in range(len(tokens), vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (vocab_size - 3)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)


def gguf_arrays(model: PreTrainedModel) -> dict[str, numpy.ndarray]:
    """The model's tensors under GGUF's names, rows in llama.cpp's order, an MoE layer's experts stacked."""
    config: Any = model.config
    arrays = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.float().numpy()
        if name.endswith("experts.gate_up_proj"):
            layer = name.split(".")[2]
            arrays[f"blk.{layer}.ffn_gate_exps.weight"], arrays[f"blk.{layer}.ffn_up_exps.weight"] = (
                numpy.ascontiguousarray(half) for half in numpy.split(array, 2, axis=1)
            )
            continue
        if name.endswith("experts.down_proj"):
            arrays[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"] = array
            continue
        if ARCHITECTURES[config.model_type] == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = interleave_rotary_halves(array, heads)
        arrays[_gguf_name(name)] = numpy.ascontiguousarray(array)
    return arrays


def _gguf_name(name: str) -> str:
    stem, _, ending = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{ending}"
    _, _, layer, module = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[module]}.{ending}"


def interleave_rotary_halves(weight: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Query and key rows (half, pair) -> (pair, half) within each head."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def llama3_factors(config: Any) -> numpy.ndarray:
    """What the converter stores as `rope_freqs.weight`: plain over scaled frequencies, by the published formula."""
    rope = config.rope_parameters
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, config.head_dim, 2).double() / config.head_dim)
    wavelengths = 2 * torch.pi / plain
    original, low, high = (
        rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float().numpy()
