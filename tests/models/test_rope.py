"""RoPE variants: frequencies and factor are those of transformers' own model, in either spelling of config.json."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_opd.errors import UserError
from megatron_opd.models.rope import RopeSettings, read_rope
from tests.models.rope_variants import ROPE_VARIANTS

PLACE = "model/config.json"


def older_spelling(entry: dict) -> dict:
    """`rope_theta` at the top and the rest in `rope_scaling`, its kind as `type`."""
    entry = dict(entry)
    theta, kind = entry.pop("rope_theta"), entry.pop("rope_type")
    return {"rope_theta": theta, "rope_scaling": {"type": kind, **entry}}


@pytest.mark.parametrize("variant", ROPE_VARIANTS)
def test_frequencies_are_those_of_transformers(variant):
    entry = ROPE_VARIANTS[variant]
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(head_dim=24, max_position_embeddings=64, rope_parameters=dict(entry))
    )
    config = {"max_position_embeddings": 64}
    newer = read_rope({**config, "rope_parameters": entry}, PLACE)
    older = read_rope({**config, **older_spelling(entry)}, PLACE)
    assert newer == older
    frequencies, factor = newer.frequencies(24, 64)
    assert torch.equal(frequencies, theirs.inv_freq)
    assert factor == theirs.attention_scaling


def test_variants_differ():
    found = [
        read_rope({"rope_parameters": entry}, PLACE).frequencies(24, 64) for entry in ROPE_VARIANTS.values()
    ]
    assert len({(tuple(frequencies.tolist()), factor) for frequencies, factor in found}) == len(found)


def test_defaults():
    assert read_rope({}, PLACE) == RopeSettings(10000.0, "default", {})
    assert read_rope({"rope_theta": 123.0, "rope_scaling": None}, PLACE) == RopeSettings(123.0, "default", {})
    yarn = {"rope_type": "yarn", "factor": 2.0}
    numbers = read_rope({"rope_parameters": yarn, "max_position_embeddings": 99}, PLACE).numbers
    assert numbers == {"factor": 2.0, "original_max_position_embeddings": 99}
    beside = {"rope_parameters": yarn, "original_max_position_embeddings": 7}
    assert read_rope(beside, PLACE).numbers["original_max_position_embeddings"] == 7


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic' is not supported; supported: default, linear,"),
        ({"type": "longrope", "short_factor": [1.0]}, "RoPE scaling 'longrope' is not supported"),
        ({"type": "default", "mrope_section": [1, 2, 3]}, "'default' with mrope_section is not supported"),
        ({"rope_type": "linear"}, "RoPE scaling 'linear' lacks the number 'factor'"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
            "lacks the number 'high_freq_factor'",
        ),
        ({"rope_type": "linear", "factor": "2"}, "factor of RoPE has to be a number above 0, not '2'"),
        ({"rope_type": "yarn", "factor": -1.0}, "factor of RoPE has to be a number above 0, not -1.0"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line(rope, words):
    with pytest.raises(UserError, match=r"^model/config\.json: ") as caught:
        read_rope({"rope_parameters": rope}, PLACE)
    assert words in str(caught.value) and "\n" not in str(caught.value)
