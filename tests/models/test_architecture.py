"""Reading a Hugging Face config: what is understood, and that everything else is refused with one line."""

import json

import pytest

from megatron_opd.errors import UserError
from megatron_opd.models.architecture import read_architecture

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


def _folder(tmp_path, **changes):
    config = {key: value for key, value in {**QWEN3, **changes}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_sizes_are_read(tmp_path):
    arch = read_architecture(_folder(tmp_path))
    assert (arch.family, arch.num_layers, arch.num_kv_groups, arch.head_dim) == ("qwen3", 4, 2, 16)
    assert arch.tied_embeddings and arch.qk_norm and not arch.qkv_bias
    assert (arch.rope_theta, arch.norm_eps, arch.max_positions) == (5e5, 1e-5, 128)


def test_rope_theta_in_the_older_spelling(tmp_path):
    arch = read_architecture(_folder(tmp_path, rope_parameters=None, rope_theta=123.0, head_dim=None))
    assert arch.rope_theta == 123.0
    assert arch.head_dim == 16


@pytest.mark.parametrize(("tensor", "expected"), [(1, 256), (2, 256), (4, 512)])
def test_padded_vocab_gives_every_shard_a_multiple_of_128(tmp_path, tensor, expected):
    assert read_architecture(_folder(tmp_path)).padded_vocab_size(tensor) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: llama, qwen2, qwen3"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
            "RoPE scaling 'yarn' is not supported",
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "RoPE scaling 'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"use_sliding_window": True}, "sliding-window attention is not supported"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias=true is not supported"),
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
