"""Pruning: the pruned folder is the same model without those layers, channels and heads."""

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_opd.errors import UserError
from megatron_opd.models.architecture import read_architecture
from tests.data.tiny_tokenizer import save_tokenizer
from tests.tools.prunable import CONFIGS, DENSE, load_whole, logits, save_model
from tools.prune_layers import (
    FFN,
    KV_GROUPS,
    Width,
    evenly_spaced,
    least_influential,
    main,
    most_active,
    prune,
    pruned_config,
)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("save_options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_logits_equal_those_of_the_model_with_the_layers_removed(tmp_path, family, tied, save_options):
    model = save_model(tmp_path / "full", family, tied=tied, **save_options)
    prune(tmp_path / "full", tmp_path / "pruned", [1, 4])
    kept = [model.model.layers[i] for i in (0, 2, 3, 5)]
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = 4
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    pruned = load_whole(tmp_path / "pruned")
    assert len(pruned.model.layers) == 4
    assert torch.equal(logits(pruned), logits(model))


@pytest.mark.parametrize("family", DENSE)
def test_ffn_channels_that_give_nothing_are_removed_without_a_trace(tmp_path, family):
    """Other channels in each layer; the widths go by the layers' numbers in the source."""
    unused = {layer: range(layer % 3, 48, 3) for layer in range(6)}

    def silence(model):
        for layer, channels in unused.items():
            model.model.layers[layer].mlp.down_proj.weight[:, list(channels)] = 0

    save_model(tmp_path / "full", family, change=silence)
    prune(tmp_path / "full", tmp_path / "shallow", [0, 2])
    kept = {layer: torch.tensor(sorted(set(range(48)) - set(unused[layer]))) for layer in (1, 3, 4, 5)}
    prune(tmp_path / "full", tmp_path / "pruned", [0, 2], [Width(FFN, kept)])
    pruned = load_whole(tmp_path / "pruned")
    assert pruned.config.intermediate_size == 32
    torch.testing.assert_close(logits(pruned), logits(load_whole(tmp_path / "shallow")), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_key_value_groups_that_give_nothing_are_removed_without_a_trace(tmp_path, family):
    def silence(model):
        for number, layer in enumerate(model.model.layers):
            weight = layer.self_attn.o_proj.weight
            weight.unflatten(1, (2, -1))[:, number % 2] = 0

    model = save_model(tmp_path / "full", family, change=silence)
    before = read_architecture(tmp_path / "full")
    kept = {layer: torch.tensor([1 - layer % 2]) for layer in range(6)}
    prune(tmp_path / "full", tmp_path / "pruned", [], [Width(KV_GROUPS, kept)])
    pruned, arch = load_whole(tmp_path / "pruned"), read_architecture(tmp_path / "pruned")
    assert (arch.num_heads, arch.num_kv_groups, arch.head_dim) == (2, 1, before.head_dim)
    torch.testing.assert_close(logits(pruned), logits(model), rtol=0, atol=1e-5)


def test_what_is_kept_is_kept_in_its_dtype_to_the_bit(tmp_path):
    save_model(tmp_path / "full", change=lambda model: model.to(torch.bfloat16))
    channels = torch.tensor([3, 5, 40])
    prune(tmp_path / "full", tmp_path / "pruned", [0], [Width(FFN, dict.fromkeys(range(1, 6), channels))])
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("full", "pruned"))
    down, up = "model.layers.{}.mlp.down_proj.weight", "model.layers.{}.mlp.up_proj.weight"
    assert new[down.format(0)].dtype == torch.bfloat16
    assert torch.equal(new[down.format(0)], old[down.format(1)][:, channels])
    assert torch.equal(new[up.format(4)], old[up.format(5)][channels])
    assert torch.equal(new["model.embed_tokens.weight"], old["model.embed_tokens.weight"])


def test_the_index_of_a_sharded_folder_is_written_anew(tmp_path):
    save_model(tmp_path / "full", max_shard_size="20KB")
    prune(tmp_path / "full", tmp_path / "pruned", [0], file_bytes=20_000)
    index = json.loads((tmp_path / "pruned" / "model.safetensors.index.json").read_text())
    files = {file.name for file in (tmp_path / "pruned").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert not any(".layers.5." in name for name in index["weight_map"])
    tensors = [tensor for file in files for tensor in load_file(tmp_path / "pruned" / file).values()]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)


def test_an_index_of_one_file_stays(tmp_path):
    source = tmp_path / "full"
    save_model(source)
    names = load_file(source / "model.safetensors")
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    prune(source, tmp_path / "pruned", [0])
    assert len(load_whole(tmp_path / "pruned").model.layers) == 5


def test_the_tokenizer_comes_along_and_other_weights_do_not(tmp_path):
    save_model(tmp_path / "full")
    (tmp_path / "full" / "tokenizer.json").write_text("{}")
    for name in ("pytorch_model.bin", "consolidated.safetensors"):
        (tmp_path / "full" / name).write_bytes(b"the unpruned model in another form")
    prune(tmp_path / "full", tmp_path / "pruned", [0])
    assert (tmp_path / "pruned" / "tokenizer.json").read_text() == "{}"
    assert {file.name for file in (tmp_path / "pruned").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_settings_listed_per_layer_follow_their_layers():
    config = {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"], "eos_token_id": [1, 2, 3, 4]}
    expected = {"num_hidden_layers": 2, "layer_types": ["a", "d"], "eos_token_id": [1, 2, 3, 4]}
    assert pruned_config(config, [0, 3]) == expected


def test_the_layers_of_the_quickstart():
    assert evenly_spaced(30, keep=24, start=8, stop=26) == [8, 11, 14, 17, 20, 23]


@settings(deadline=None)
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


def test_the_least_influential_layers_of_a_range():
    influence = [0.9, 0.1, 0.4, 0.3, 0.2, 0.0]
    assert least_influential(influence, keep=4, start=0, stop=6) == [1, 5]
    assert least_influential(influence, keep=4, start=2, stop=5) == [3, 4]


def test_the_most_active_parts_and_the_first_of_equal_ones():
    width = most_active(FFN, {2: torch.tensor([1.0, 3.0, 1.0, 2.0]), 5: torch.ones(4)}, 3)
    assert {layer: kept.tolist() for layer, kept in width.kept.items()} == {2: [0, 1, 3], 5: [0, 1, 2]}
    assert width.size == 3


@pytest.mark.parametrize(
    ("keep", "start", "stop"), [(6, 0, 6), (0, 0, 6), (2, 3, 6), (4, -1, 6), (4, 0, 7), (3, 2, 4)]
)
def test_impossible_numbers_are_refused(keep, start, stop):
    with pytest.raises(UserError, match="--keep must lie between"):
        evenly_spaced(6, keep, start, stop)


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ([1, 6], r"has layers 0 to 5; cannot drop \[6\]"),
        ([-1], r"cannot drop \[-1\]"),
        (range(6), "must stay"),
    ],
)
def test_layers_that_cannot_be_dropped(tmp_path, dropped, message):
    save_model(tmp_path / "full")
    with pytest.raises(UserError, match=message):
        prune(tmp_path / "full", tmp_path / "pruned", dropped)
    assert not (tmp_path / "pruned").exists()


def _cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def _without_weights(folder):
    (folder / "model.safetensors").unlink()


def _of_another_family(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "num_hidden_layers": 6}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut_short, "model.safetensors is not a complete safetensors file"),
        (_without_a_tensor, "lacks the tensor model.layers.3.mlp.up_proj.weight"),
        (_without_weights, "has no weights"),
        (_of_another_family, "model_type 'gpt2' is not supported"),
    ],
)
def test_a_damaged_source_is_one_line(tmp_path, capsys, damage, message):
    save_model(tmp_path / "full")
    damage(tmp_path / "full")
    capsys.readouterr()
    assert main([str(tmp_path / "full"), str(tmp_path / "pruned"), "--drop", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*pruned*"))


def test_dropping_evenly_and_by_list_from_the_command_line(tmp_path, capsys):
    save_model(tmp_path / "full")
    source, destination = str(tmp_path / "full"), str(tmp_path / "pruned")
    assert main([source, destination, "--keep", "4", "--from", "2"]) == 0
    assert "4 of 6 layers, without 2, 4" in capsys.readouterr().out
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["num_hidden_layers"] == 4
    assert main([source, destination, "--keep", "4"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), str(tmp_path / "x"), "--keep", "4"]) == 2
    assert "model folder not found" in capsys.readouterr().err
    assert main([source, str(tmp_path / "listed"), "--drop", "5,0,3"]) == 0
    assert "3 of 6 layers, without 0, 3, 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "nothing to prune"),
        ("--drop 1 --keep 5", "exclude each other"),
        ("--drop 1,x", "layer numbers with commas"),
        ("--drop 1 --from 2", "need --keep"),
        ("--by-influence TEXT", "need --keep"),
        ("--keep 5 --to 0", "--keep must lie between"),
        ("--keep 9 --by-influence TEXT", "--keep must lie between"),
        ("--ffn 24", "go together with --by-activation"),
        ("--drop 1 --by-activation TEXT", "go together with --by-activation"),
        ("--ffn 48 --by-activation TEXT", "--ffn 48: must lie between 1 and 47"),
        ("--ffn 0 --by-activation TEXT", "--ffn 0: must lie between 1 and 47"),
        ("--kv-groups 2 --by-activation TEXT", "--kv-groups 2: must lie between 1 and 1"),
        ("--ffn 24 --by-activation none.txt", "none.txt: no such calibration text"),
        ("--keep 5 --by-influence TEXT --tokens 1", "2 tokens or more"),
    ],
)
def test_options_that_make_no_sense_are_one_line(tmp_path, capsys, options, message):
    save_model(tmp_path / "full")
    save_tokenizer(tmp_path / "full")
    (tmp_path / "text.txt").write_text("one two three")
    words = options.replace("TEXT", str(tmp_path / "text.txt")).split()
    capsys.readouterr()
    assert main([str(tmp_path / "full"), str(tmp_path / "pruned"), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "pruned").exists()


def test_ffn_channels_of_experts_are_refused(tmp_path, capsys):
    save_model(tmp_path / "full", "qwen3_moe")
    words = ["--ffn", "8", "--by-activation", str(tmp_path / "text.txt")]
    assert main([str(tmp_path / "full"), str(tmp_path / "pruned"), *words]) == 2
    assert "--ffn is for dense models" in capsys.readouterr().err
