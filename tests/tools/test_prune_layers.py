"""Depth pruning: the pruned folder is the same model without those layers."""

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_opd.errors import UserError
from tools.prune_layers import evenly_spaced, main, prune, pruned_config


def save_llama(folder, *, layers=6, tied=True, **save_options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder, **save_options)
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20).view(2, 10)).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("save_options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_logits_equal_those_of_the_model_with_the_layers_removed(tmp_path, tied, save_options):
    model = save_llama(tmp_path / "full", tied=tied, **save_options)
    prune(tmp_path / "full", tmp_path / "pruned", [1, 4])
    kept = [model.model.layers[i] for i in (0, 2, 3, 5)]
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = 4
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    pruned, report = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(pruned.model.layers) == 4
    assert torch.equal(logits(pruned.eval()), logits(model))


def test_the_index_of_a_sharded_folder_is_written_anew(tmp_path):
    save_llama(tmp_path / "full", max_shard_size="20KB")
    prune(tmp_path / "full", tmp_path / "pruned", [0])
    index = json.loads((tmp_path / "pruned" / "model.safetensors.index.json").read_text())
    files = {file.name for file in (tmp_path / "pruned").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert not any(".layers.5." in name for name in index["weight_map"])


def test_other_files_are_kept(tmp_path):
    save_llama(tmp_path / "full")
    (tmp_path / "full" / "tokenizer.json").write_text("{}")
    prune(tmp_path / "full", tmp_path / "pruned", [0])
    assert (tmp_path / "pruned" / "tokenizer.json").read_text() == "{}"


def test_settings_listed_per_layer_follow_their_layers():
    config = {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"], "eos_token_id": [1, 2, 3, 4]}
    expected = {"num_hidden_layers": 2, "layer_types": ["a", "d"], "eos_token_id": [1, 2, 3, 4]}
    assert pruned_config(config, [0, 3]) == expected


def test_the_layers_of_the_quickstart():
    assert evenly_spaced(30, keep=24, start=8, stop=26) == [8, 11, 14, 17, 20, 23]


@given(layers=st.integers(2, 80), data=st.data())
def test_dropped_layers_are_distinct_and_evenly_spread(layers, data):
    start = data.draw(st.integers(0, layers - 1))
    stop = data.draw(st.integers(start + 1, layers))
    drop = data.draw(st.integers(1, min(stop - start, layers - 1)))
    dropped = evenly_spaced(layers, layers - drop, start, stop)
    assert len(set(dropped)) == drop and dropped == sorted(dropped)
    assert start == dropped[0] and dropped[-1] < stop
    gaps = {b - a for a, b in pairwise([*dropped, stop])}
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("keep", "start", "stop"), [(6, 0, 6), (0, 0, 6), (2, 3, 6), (4, -1, 6), (4, 0, 7), (3, 2, 4)]
)
def test_impossible_numbers_are_refused(keep, start, stop):
    with pytest.raises(UserError, match="--keep must lie between"):
        evenly_spaced(6, keep, start, stop)


def test_a_layer_that_is_not_there(tmp_path):
    save_llama(tmp_path / "full")
    with pytest.raises(UserError, match=r"has layers 0 to 5; cannot drop \[6\]"):
        prune(tmp_path / "full", tmp_path / "pruned", [1, 6])
    assert not (tmp_path / "pruned").exists()


def test_command_line(tmp_path, capsys):
    save_llama(tmp_path / "full")
    source, destination = str(tmp_path / "full"), str(tmp_path / "pruned")
    assert main([source, destination, "--keep", "4", "--from", "2"]) == 0
    assert "4 of 6 layers, without 2, 4" in capsys.readouterr().out
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["num_hidden_layers"] == 4
    assert main([source, destination, "--keep", "4"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main([str(tmp_path / "none"), str(tmp_path / "x"), "--keep", "4"]) == 2
    assert "no config.json" in capsys.readouterr().err
