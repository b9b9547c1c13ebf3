"""What a Hugging Face `config.json` says about a decoder, as one small dataclass.

Supported are the families of `families`, dense or with experts in every layer, with the RoPE variants of `rope`.
Everything else is refused with one clear line, at start-up.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_opd.errors import UserError
from megatron_opd.models.families import FAMILIES
from megatron_opd.models.families.rows import LM_HEAD, Family
from megatron_opd.models.rope import RopeSettings, read_rope


@dataclass(frozen=True)
class MoESettings:
    """The experts of every layer: a token goes to the `experts_per_token` likeliest of `num_experts`."""

    num_experts: int
    experts_per_token: int
    expert_ffn_size: int
    norm_topk_prob: bool
    """Whether a token's weights sum to 1; otherwise they are its probabilities under the softmax over all experts."""
    aux_loss_coefficient: float
    """Factor of the balancing loss of every layer in training; see `router.Router` for what it is."""


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder-only transformer. Counts are of the whole model, not of a shard.

    `ffn_size` is that of the dense layers; with `moe` there are none.
    """

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
    rope: RopeSettings
    norm_eps: float
    max_positions: int
    moe: MoESettings | None = None

    @property
    def num_experts(self) -> int:
        """Experts of a layer, 0 in a dense model."""
        return self.moe.num_experts if self.moe else 0

    @property
    def dimensions(self) -> dict[str, int]:
        """The dimensions that the rows of the families' tables name."""
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "query": self.num_heads * self.head_dim,
            "key": self.num_kv_groups * self.head_dim,
            "head": self.head_dim,
            "ffn": self.ffn_size,
            "experts": self.num_experts,
            "expert_ffn": self.moe.expert_ffn_size if self.moe else 0,
        }

    def parameter_count(self, *, active: bool = False) -> int:
        """Parameters without padding, tied embeddings once; `active`: those that one token passes through."""
        total = 0
        for row in FAMILIES[self.family].rows:
            if self.tied_embeddings and row.hf[0][0] == LM_HEAD:
                continue
            copies = self.num_layers if row.in_layer else 1
            if row.in_expert:
                assert self.moe is not None
                copies *= self.moe.experts_per_token if active else self.num_experts
            total += copies * row.numel(self.dimensions)
        return total

    def with_aux_loss(self, coefficient: float | None) -> "Architecture":
        """The same model with another coefficient of the balancing loss; None keeps it."""
        if self.moe is None or coefficient is None:
            return self
        return replace(self, moe=replace(self.moe, aux_loss_coefficient=coefficient))

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of 128 * `tensor_parallel`.

        A multiple of 128 a shard keeps the GEMM shapes good and every shard equally wide.
        """
        multiple = 128 * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple


@dataclass(frozen=True)
class ServedModel:
    """What has to be known of a model that servers run: any family that they support."""

    vocab_size: int
    max_positions: int
    architectures: tuple[str, ...]  # names of its classes, as config.json has them; may be empty


def read_served(folder: Path) -> ServedModel:
    """Read `folder/config.json` of a model of any family. Raises UserError for one that lacks a size."""
    config = read_config_json(folder)
    sizes = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    for key in ("vocab_size", "max_position_embeddings"):
        if not isinstance(sizes.get(key), int) or sizes[key] < 1:
            raise UserError(
                f"{folder}/config.json: {key} has to be a whole number above 0, not {sizes.get(key)!r}"
            )
    names = config.get("architectures")
    return ServedModel(
        sizes["vocab_size"],
        sizes["max_position_embeddings"],
        tuple(str(name) for name in names) if isinstance(names, list) else (),
    )


def read_config_json(folder: Path) -> dict:
    """The `config.json` of a model folder. Raises UserError when the folder or the file is missing or broken."""
    if not folder.is_dir():
        raise UserError(f"model folder not found: {folder} (models are read from folders, not from a hub)")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} is not a model folder: it has no config.json") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object")
    return config


_COUNTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "sliding_window",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "decoder_sparse_step",
)
_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(_COUNTS, (int, "a whole number above 0")),
    **dict.fromkeys(("rms_norm_eps", "router_aux_loss_coef"), ((int, float), "a number")),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), (dict, "an object")),
    **dict.fromkeys(("layer_types", "mlp_only_layers"), (list, "a list")),
    **dict.fromkeys(("model_type", "hidden_act"), (str, "text")),
}


def _checked_kinds(config: dict, where: str) -> dict:
    """The keys that have a value (null is none). Raises UserError for one whose value is of the wrong kind."""
    given = {key: value for key, value in config.items() if value is not None}
    for key in _KINDS.keys() & given.keys():
        (kind, wanted), value = _KINDS[key], given[key]
        wrong = not isinstance(value, kind) or (kind is not str and isinstance(value, bool))
        if wrong or (key in _COUNTS and value < 1):
            raise UserError(f"{where}: {key} has to be {wanted}, not {value!r}")
    return given


def _refuse_unsupported(config: dict, family: Family, where: str) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act '{config['hidden_act']}' is not supported, only 'silu' is")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise UserError(f"{where}: {key}=true is not supported for {family.model_type}")
    heads, groups = config.get("num_attention_heads", 0), config.get("num_key_value_heads", 1)
    if heads % groups:
        raise UserError(
            f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"
        )
    _refuse_windows(config, family, where)


def _refuse_windows(config: dict, family: Family, where: str) -> None:
    """Attention that does not see every earlier position; a window that holds all positions is none."""
    windowed = family.windowed or config.get("use_sliding_window")
    window = config.get("sliding_window", 4096) if windowed else None  # 4096: transformers' default
    if window is not None and window < config.get("max_position_embeddings", 2048):
        remedy = "set sliding_window null" if family.windowed else "set use_sliding_window false"
        raise UserError(
            f"{where}: sliding-window attention ({window} positions) is not supported: {remedy}, or set "
            f"max_position_embeddings to {window} if no sequence is longer"
        )
    for kind in config.get("layer_types") or ():
        if kind != "full_attention" and not (windowed and kind == "sliding_attention"):
            raise UserError(f"{where}: layers of type '{kind}' are not supported, only 'full_attention' is")


def _read_moe(config: dict, where: str) -> MoESettings:
    """The experts' settings. Raises UserError when some layers have none, KeyError for a missing key."""
    if config.get("mlp_only_layers"):
        raise UserError(f"{where}: mlp_only_layers is not supported: every layer has to have experts")
    if config.get("decoder_sparse_step", 1) != 1:
        raise UserError(f"{where}: decoder_sparse_step other than 1 is not supported")
    moe = MoESettings(
        num_experts=config.get("num_local_experts")
        or config["num_experts"],  # transformers 5's name, and the older
        experts_per_token=config["num_experts_per_tok"],
        expert_ffn_size=config["moe_intermediate_size"],
        norm_topk_prob=bool(config.get("norm_topk_prob", False)),
        # transformers adds this loss only where the router's logits are asked for
        aux_loss_coefficient=float(
            config.get("router_aux_loss_coef", 0.001) if config.get("output_router_logits") else 0.0
        ),
    )
    if not 0 < moe.experts_per_token <= moe.num_experts:
        raise UserError(
            f"{where}: num_experts_per_tok {moe.experts_per_token} does not fit {moe.num_experts} experts"
        )
    if moe.experts_per_token == 1 and moe.norm_topk_prob:
        raise UserError(
            f"{where}: norm_topk_prob with one expert a token is not supported: no router can learn"
        )
    return moe


def read_architecture(folder: str | Path) -> Architecture:
    """Read `folder/config.json` (a Hugging Face or a Megatron folder).

    Raises UserError for a missing folder, an unknown family, or any unsupported setting.
    """
    folder = Path(folder)
    where = f"{folder}/config.json"
    config = _checked_kinds(read_config_json(folder), where)
    model_type = config.get("model_type", "?")
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"{where}: model_type '{model_type}' is not supported; supported: {known}")
    family = FAMILIES[model_type]
    _refuse_unsupported(config, family, where)
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return Architecture(
            family=model_type,
            num_layers=config["num_hidden_layers"],
            hidden_size=hidden,
            num_heads=heads,
            num_kv_groups=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            ffn_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            rope=read_rope(config, where),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            max_positions=config.get("max_position_embeddings", 2048),
            moe=_read_moe(config, where) if family.experts else None,
        )
    except KeyError as error:
        raise UserError(f"{where} lacks the key {error}") from None
