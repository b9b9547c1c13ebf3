"""Reading a Hugging Face config: what is understood, and that everything else is refused with one line."""

import json

import pytest

from megatron_opd.errors import UserError
from megatron_opd.models.architecture import MoESettings, read_architecture
from megatron_opd.models.families import FAMILIES
from megatron_opd.models.rope import RopeSettings

QWEN3 = {
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 250,
    "tie_word_embeddings": True,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
}

EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def _folder(tmp_path, **changes):
    config = {key: value for key, value in {**QWEN3, **changes}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_sizes_are_read(tmp_path):
    arch = read_architecture(_folder(tmp_path))
    assert (arch.family, arch.num_layers, arch.num_kv_groups, arch.head_dim) == ("qwen3", 4, 2, 16)
    assert arch.tied_embeddings and arch.qk_norm and not arch.qkv_bias
    assert arch.rope == RopeSettings(5e5, "default", {})
    assert (arch.norm_eps, arch.max_positions, arch.moe) == (1e-5, 128, None)


def test_head_size_follows_from_the_heads_where_it_is_not_given(tmp_path):
    assert read_architecture(_folder(tmp_path, head_dim=None)).head_dim == 16


def test_every_family_says_what_its_layers_have(tmp_path):
    traits = {}
    for model_type in FAMILIES:
        arch = read_architecture(
            _folder(tmp_path, **(EXPERTS | {"model_type": model_type}), sliding_window=999)
        )
        traits[model_type] = (arch.qkv_bias, arch.qk_norm, arch.moe is not None)
    assert traits == {
        "llama": (False, False, False),
        "mistral": (False, False, False),
        "qwen2": (True, False, False),
        "qwen3": (False, True, False),
        "qwen3_moe": (False, True, True),
    }


@pytest.mark.parametrize("spelling", ["num_experts", "num_local_experts"])
def test_experts_are_read_in_either_spelling(tmp_path, spelling):
    changes = {**EXPERTS, "num_experts": None, spelling: 6, "norm_topk_prob": True}
    assert read_architecture(_folder(tmp_path, **changes)).moe == MoESettings(6, 2, 32, True, 0.0)


@pytest.mark.parametrize(("asked", "expected"), [(True, 0.02), (False, 0.0)])
def test_balancing_loss_is_on_where_transformers_adds_it(tmp_path, asked, expected):
    folder = _folder(tmp_path, **EXPERTS, router_aux_loss_coef=0.02, output_router_logits=asked)
    moe = read_architecture(folder).moe
    assert moe is not None and moe.aux_loss_coefficient == expected


def test_window_as_long_as_the_positions_is_none(tmp_path):
    folder = _folder(tmp_path, model_type="mistral", sliding_window=128)
    assert read_architecture(folder).max_positions == 128


@pytest.mark.parametrize(("tensor", "expected"), [(1, 256), (2, 256), (4, 512)])
def test_padded_vocab_gives_every_shard_a_multiple_of_128(tmp_path, tensor, expected):
    assert read_architecture(_folder(tmp_path)).padded_vocab_size(tensor) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "mamba"},
            "model_type 'mamba' is not supported; supported: llama, mistral, qwen2, qwen3, qwen3_moe",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (
            {"use_sliding_window": True, "sliding_window": 64},
            "sliding-window attention (64 positions) is not supported: set use_sliding_window false",
        ),
        (
            {"model_type": "mistral", "max_position_embeddings": 8192},
            "sliding-window attention (4096 positions) is not supported: set sliding_window null",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "type 'sliding_attention' are not"),
        ({**EXPERTS, "mlp_only_layers": [1]}, "mlp_only_layers is not supported"),
        ({**EXPERTS, "decoder_sparse_step": 2}, "decoder_sparse_step other than 1 is not supported"),
        ({**EXPERTS, "num_experts_per_tok": 5}, "num_experts_per_tok 5 does not fit 4 experts"),
        ({**EXPERTS, "num_experts_per_tok": 1, "norm_topk_prob": True}, "norm_topk_prob with one expert"),
        ({**EXPERTS, "moe_intermediate_size": None}, "lacks the key 'moe_intermediate_size'"),
        ({**EXPERTS, "num_experts": None}, "lacks the key 'num_experts'"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias=true is not supported"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"num_hidden_layers": None}, "lacks the key 'num_hidden_layers'"),
    ],
)
def test_unsupported_configs_are_refused_in_one_line(tmp_path, changes, words):
    with pytest.raises(UserError, match=r"config\.json") as caught:
        read_architecture(_folder(tmp_path, **changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_folder_missing_file_and_broken_json(tmp_path):
    with pytest.raises(UserError, match="model folder not found"):
        read_architecture(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="holds no JSON object"):
        read_architecture(tmp_path)
