"""What a Hugging Face `config.json` says about a dense decoder, as one small dataclass.

Supported: Llama, Qwen2 and Qwen3 (dense) with plain RoPE. Everything else is refused with one clear line, at start-up.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_opd.errors import UserError

FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # HF model_type -> family


@dataclass(frozen=True)
class Architecture:
    """Sizes of a dense decoder-only transformer. Counts are of the whole model, not of a shard."""

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_groups: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rope_theta: float
    norm_eps: float
    max_positions: int

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of 128 * `tensor_parallel`.

        A multiple of 128 a shard keeps the GEMM shapes good and every shard equally wide.
        """
        multiple = 128 * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple


def read_config_json(folder: Path) -> dict:
    """The `config.json` of a model folder. Raises UserError when the folder or the file is missing or broken."""
    if not folder.is_dir():
        raise UserError(f"model folder not found: {folder} (models are read from folders, not from a hub)")
    path = folder / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} is not a model folder: it has no config.json") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def _rope_theta(config: dict, folder: Path) -> float:
    """RoPE base from either spelling (`rope_parameters` of transformers 5, `rope_theta` before it)."""
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    if kind != "default":
        raise UserError(
            f"{folder}/config.json: RoPE scaling '{kind}' is not supported yet, only plain RoPE is"
        )
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)


def _refuse_unsupported(config: dict, family: str, folder: Path) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"{folder}/config.json: hidden_act '{config['hidden_act']}' is not supported, only 'silu' is"
        )
    rope = config.get("rope_parameters") or {}
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{folder}/config.json: partial_rotary_factor other than 1 is not supported")
    if config.get("use_sliding_window"):
        raise UserError(
            f"{folder}/config.json: sliding-window attention is not supported: set use_sliding_window false"
        )
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise UserError(f"{folder}/config.json: {key}=true is not supported for {family}")


def read_architecture(folder: str | Path) -> Architecture:
    """Read `folder/config.json` (a Hugging Face or a Megatron folder).

    Raises UserError for a missing folder, an unknown family, a RoPE scaling variant or any other unsupported setting.
    """
    folder = Path(folder)
    config = read_config_json(folder)
    model_type = config.get("model_type", "?")
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(
            f"{folder}/config.json: model_type '{model_type}' is not supported; supported: {known}"
        )
    family = FAMILIES[model_type]
    _refuse_unsupported(config, family, folder)
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return Architecture(
            family=family,
            num_layers=config["num_hidden_layers"],
            hidden_size=hidden,
            num_heads=heads,
            num_kv_groups=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            ffn_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            rope_theta=_rope_theta(config, folder),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            max_positions=config.get("max_position_embeddings", 2048),
        )
    except KeyError as error:
        raise UserError(f"{folder}/config.json lacks the key {error}") from None
