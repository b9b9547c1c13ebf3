"""What layers, channels and heads do to a text: against hooks in the whole model, and where they do nothing."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from megatron_opd.errors import UserError
from tests.data.tiny_tokenizer import make_tokenizer, save_tokenizer
from tests.tools.prunable import CONFIGS, load_whole, logits, save_model
from tools import prune_importance
from tools.prune_importance import measure, read_samples
from tools.prune_layers import main, prune

SAMPLES = [[3, 4, 5, 6, 7], [9, 8, 7], [30, 31, 32, 33, 34, 35, 36, 37, 38], [1]]
YARN = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def measured_in_the_whole_model(model):
    """Per layer: influence, [groups] and [channels] from hooks, sample by sample, without padding."""
    seen: dict[str, list] = {}

    def keep(key, value):
        seen.setdefault(key, []).append(value[0])

    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda module, inputs, output, n=number: keep(
                f"cosine {n}", cosine_similarity(inputs[0], output, dim=-1)
            )
        )
        watched = {"groups": layer.self_attn.o_proj}
        if hasattr(layer.mlp, "down_proj"):
            watched["ffn"] = layer.mlp.down_proj
        for kind, module in watched.items():
            module.register_forward_pre_hook(
                lambda module, inputs, key=f"{kind} {number}": keep(key, inputs[0])
            )
    with torch.no_grad():
        for sample in SAMPLES:
            model(torch.tensor([sample]))

    def added(key, weight):
        """Mean length of what each of the two groups adds, by multiplying with the other set to 0."""
        values = torch.cat(seen[key])
        one = torch.eye(2).repeat_interleave(values.shape[1] // 2, dim=1)
        return torch.stack([((values * row) @ weight.T).norm(dim=-1).mean() for row in one])

    return [
        (
            float(1 - torch.cat(seen[f"cosine {n}"]).mean()),
            added(f"groups {n}", layer.self_attn.o_proj.weight.detach()),
            torch.cat(seen[f"ffn {n}"]).abs().mean(dim=0) if f"ffn {n}" in seen else None,
        )
        for n, layer in enumerate(model.model.layers)
    ]


@pytest.mark.parametrize("batch_tokens", [4096, 6], ids=["one batch", "several batches"])
@pytest.mark.parametrize("family", [*CONFIGS, "llama with yarn"])
def test_measured_layer_by_layer_as_in_the_whole_model(tmp_path, monkeypatch, family, batch_tokens):
    monkeypatch.setattr(prune_importance, "BATCH_TOKENS", batch_tokens)
    settings: dict = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    if "yarn" in family:
        settings["rope_parameters"] = YARN
    model = save_model(tmp_path, family.split()[0], layers=3, settings=settings)
    expected = measured_in_the_whole_model(model)
    measured = measure(tmp_path, SAMPLES, range(3))
    assert list(measured) == [0, 1, 2]
    for found, (influence, groups, ffn) in zip(measured.values(), expected, strict=True):
        assert found.influence == pytest.approx(influence, rel=1e-4) and influence > 0.01
        torch.testing.assert_close(found.kv_groups, groups, rtol=1e-4, atol=1e-6)
        if ffn is None:
            assert found.ffn is None
        else:
            torch.testing.assert_close(found.ffn, ffn, rtol=1e-4, atol=1e-6)


def test_measuring_without_some_layers_is_measuring_the_pruned_model(tmp_path):
    save_model(tmp_path / "full", max_shard_size="20KB")
    prune(tmp_path / "full", tmp_path / "pruned", [0, 3])
    skipping = measure(tmp_path / "full", SAMPLES, [1, 2, 4, 5])
    pruned = measure(tmp_path / "pruned", SAMPLES, range(4))
    assert list(skipping) == [1, 2, 4, 5]
    for found, expected in zip(skipping.values(), pruned.values(), strict=True):
        assert found.influence == expected.influence
        torch.testing.assert_close(
            (found.kv_groups, found.ffn), (expected.kv_groups, expected.ffn), rtol=0, atol=0
        )


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_no_two_layers_are_in_memory_at_once(tmp_path, monkeypatch, family):
    save_model(tmp_path, family)
    load = prune_importance._one_layer
    loaded: list[weakref.ref] = []

    def load_and_watch(*arguments):
        assert not any(weight() is not None for weight in loaded), "an earlier layer is still there"
        model = load(*arguments)
        loaded.extend(weakref.ref(weight) for weight in model.parameters())
        return model

    monkeypatch.setattr(prune_importance, "_one_layer", load_and_watch)
    gc.collect()
    gc.disable()  # a cycle would be cleared away only now and then
    try:
        measure(tmp_path, SAMPLES, range(6))
    finally:
        gc.enable()
    assert len(loaded) >= 6 * 9


def _identity(*numbers):
    def change(model):
        for number in numbers:
            layer = model.model.layers[number]
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.weight.zero_()

    return change


def write_text(folder):
    file = folder.parent / "text.jsonl"
    file.write_text(
        json.dumps({"text": "one two three four"}) + "\n" + json.dumps({"text": "five six"}) + "\n"
    )
    save_tokenizer(folder)
    return str(file)


def test_layers_that_do_nothing_are_found_and_dropped(tmp_path, capsys):
    source, destination = tmp_path / "full", tmp_path / "pruned"
    model = save_model(source, change=_identity(1, 4))
    text = write_text(source)
    assert main([str(source), str(destination), "--keep", "4", "--by-influence", text]) == 0
    out = capsys.readouterr().out
    assert "measured on 6 tokens in 2 samples" in out
    assert [line.split("│")[1].strip() for line in out.splitlines() if "│ dropped" in line] == ["1", "4"]
    assert "4 of 6 layers, without 1, 4" in out
    torch.testing.assert_close(logits(load_whole(destination)), logits(model), rtol=0, atol=1e-5)
    assert measure(source, SAMPLES, [4])[4].influence == pytest.approx(0, abs=1e-6)


def test_the_range_holds_for_measured_layers_too(tmp_path, capsys):
    source = tmp_path / "full"
    save_model(source, change=_identity(0, 3))
    words = ["--keep", "5", "--from", "1", "--by-influence", write_text(source)]
    assert main([str(source), str(tmp_path / "pruned"), *words]) == 0
    assert "without 3" in capsys.readouterr().out


def test_channels_and_groups_that_do_nothing_are_found_and_dropped(tmp_path, capsys):
    """Together with a layer that does nothing, all in one command; large values that o_proj ignores do not count."""

    def change(model):
        _identity(2)(model)
        for number, layer in enumerate(model.model.layers):
            layer.mlp.up_proj.weight[number::2] = 0
            layer.self_attn.v_proj.weight.unflatten(0, (2, -1))[number % 2] *= 100
            layer.self_attn.o_proj.weight.unflatten(1, (2, -1))[:, number % 2] = 0

    source, destination = tmp_path / "full", tmp_path / "pruned"
    model = save_model(source, layers=4, change=change)
    text = write_text(source)
    words = f"--keep 3 --by-influence {text} --ffn 26 --kv-groups 1 --by-activation {text}".split()
    assert main([str(source), str(destination), *words]) == 0
    out = capsys.readouterr().out
    assert "without 2" in out
    assert "intermediate_size 48 -> 26, keeping 100% to 100%" in out
    assert "num_key_value_heads 2 -> 1, keeping 100% to 100%" in out
    pruned = load_whole(destination)
    assert (pruned.config.intermediate_size, pruned.config.num_attention_heads) == (26, 2)
    torch.testing.assert_close(logits(pruned), logits(model), rtol=0, atol=1e-4)


@pytest.fixture
def model_folder(tmp_path):
    save_model(tmp_path / "model", layers=1)
    return save_tokenizer(tmp_path / "model")


def write(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content)
    return folder / name


def test_prompts_are_rendered_as_in_training_and_text_is_not(tmp_path, model_folder):
    tokenizer = make_tokenizer()
    rows = [{"prompt": "one two", "text": "three"}, {"prompt": "four", "text": "five"}]
    both = write(tmp_path, "both.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [tokenizer.decode(ids) for ids in read_samples(both, model_folder, 100)] == [
        "<user> one two <eos> <assistant>",
        "<user> four <eos> <assistant>",
    ]
    only_text = write(tmp_path, "text.jsonl", '{"text": "one two"}\n{"text": "three"}\n')
    plain = write(tmp_path, "text.txt", "one two\n\n  three\n")
    for file in (only_text, plain):
        assert [tokenizer.decode(ids) for ids in read_samples(file, model_folder, 100)] == [
            "one two",
            "three",
        ]


def test_only_so_many_tokens_are_taken(tmp_path, model_folder, monkeypatch):
    file = write(tmp_path, "text.txt", "one two three four five\nsix\nseven eight\n")
    assert [len(ids) for ids in read_samples(file, model_folder, 7)] == [5, 1, 1]
    monkeypatch.setattr(prune_importance, "SAMPLE_TOKENS", 3)
    assert [len(ids) for ids in read_samples(file, model_folder, 100)] == [3, 1, 2]


def test_a_sample_is_no_longer_than_the_models_positions(tmp_path):
    save_model(tmp_path / "model", layers=1, settings={"max_position_embeddings": 4})
    folder = save_tokenizer(tmp_path / "model")
    file = write(tmp_path, "text.txt", "one two three four five six")
    assert [len(ids) for ids in read_samples(file, folder, 100)] == [4]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "\n \n", "holds no text to measure on"),
        ("fields.jsonl", '{"question": "one"}\n', r"need a field 'prompt' or 'text' \(there are: question\)"),
        ("broken.jsonl", '{"text": "one"}\n{"text": \n', "broken.jsonl, line 2: not valid JSON"),
        ("empty.jsonl", "\n", "empty.jsonl: holds no text to measure on"),
        ("list.jsonl", "[1, 2]\n", "list.jsonl, line 1: not a JSON object"),
    ],
)
def test_a_bad_calibration_text_is_one_line(tmp_path, model_folder, name, content, message):
    with pytest.raises(UserError, match=message):
        read_samples(write(tmp_path, name, content), model_folder, 100)


def test_a_calibration_text_that_is_not_utf8(tmp_path, model_folder):
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_samples(tmp_path / "latin.txt", model_folder, 100)


def test_a_folder_without_a_tokenizer_or_with_another_models(tmp_path):
    save_model(tmp_path / "model", layers=1, settings={"vocab_size": 8})
    file = write(tmp_path, "text.txt", "one eight")
    with pytest.raises(UserError, match="holds no tokenizer"):
        read_samples(file, tmp_path / "model", 100)
    save_tokenizer(tmp_path / "model")
    with pytest.raises(UserError, match="has the id 13, its model only ids below 8"):
        read_samples(file, tmp_path / "model", 100)
