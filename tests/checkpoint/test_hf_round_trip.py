"""Hugging Face weights in a megatron model and back: vocabulary padding, dtypes, several files, whole folders."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_opd.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_opd.checkpoint.hf_export import save_hf
from megatron_opd.checkpoint.weights import load_model_weights
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import read_architecture
from megatron_opd.models.gpt import build_gpt
from megatron_opd.parallel import cpu
from megatron_opd.parallel.groups import ParallelLayout, build_groups
from tests.checkpoint.models import (
    assert_identical,
    hf_logits,
    hf_model,
    megatron_results,
    safetensors_of,
    write_hf,
)


@pytest.mark.parametrize("vocab_size", [100, 128, 250])
def test_vocabulary_padding_changes_with_the_layout(gloo, tmp_path, vocab_size):
    """100: the second shard of two is all padding; 128: none in one shard; 250: padded to 256 in both."""
    folder = write_hf(tmp_path / "hf", "llama", tied=False, vocab_size=vocab_size)
    hf_to_megatron(folder, tmp_path / "megatron")
    for source in (folder, tmp_path / "megatron"):
        for _, exported, padding in gloo(2, megatron_results, source, ParallelLayout(tensor=2)):
            assert_identical(exported, safetensors_of(folder))
            assert padding == 0.0


def test_bf16_keeps_its_bits_through_the_megatron_folder(gloo, tmp_path):
    folder = write_hf(tmp_path / "hf", "qwen3", tied=True, dtype=torch.bfloat16)
    hf_to_megatron(folder, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_identical(safetensors_of(tmp_path / "back"), safetensors_of(folder))
    assert hf_model(tmp_path / "back").dtype == torch.bfloat16
    for source in (folder, tmp_path / "megatron"):  # loaded into a float32 model
        exported = gloo(2, megatron_results, source, ParallelLayout(tensor=2))[0][1]
        assert_identical(exported, {name: t.float() for name, t in safetensors_of(folder).items()})


def test_fp32_source_in_a_bf16_model_is_rounded(gloo, tmp_path):
    folder = write_hf(tmp_path / "hf", "qwen3_moe", tied=False)
    hf_to_megatron(folder, tmp_path / "megatron")
    for source in (folder, tmp_path / "megatron"):
        exported = gloo(2, megatron_results, source, ParallelLayout(pipeline=2), "bf16")[0][1]
        assert_identical(exported, {name: t.bfloat16() for name, t in safetensors_of(folder).items()})


def test_sharded_source_with_an_index(gloo, tmp_path):
    folder = write_hf(tmp_path / "hf", "qwen2", tied=False, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    exported = gloo(2, megatron_results, folder, ParallelLayout(tensor=2))[0][1]
    assert_identical(exported, safetensors_of(folder))


def test_tied_source_that_also_stores_the_head(gloo, tmp_path):
    folder = write_hf(tmp_path / "hf", "llama", tied=True)
    tensors = safetensors_of(folder)
    with_head = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(with_head, folder / "model.safetensors", metadata={"format": "pt"})
    assert_identical(gloo(2, megatron_results, folder, ParallelLayout(tensor=2))[0][1], tensors)


def save_from_layout(folder: Path, out: Path, layout: ParallelLayout, **options) -> str | None:
    cpu.install()
    groups = build_groups(layout)
    arch = read_architecture(folder)
    padded = arch.padded_vocab_size(layout.tensor)
    chunks = build_gpt(arch, layout, groups, precision="fp32", padded_vocab_size=padded)
    load_model_weights(chunks, arch, folder, groups=groups, padded_vocab_size=padded)
    try:
        save_hf(chunks, arch, groups, folder, out, **options)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3", ParallelLayout(tensor=2, pipeline=2)),
        ("qwen3", ParallelLayout(data=2, pipeline=2)),
        ("qwen3", ParallelLayout(context=2)),
        ("qwen3_moe", ParallelLayout(data=2, pipeline=2, expert=2)),
        ("qwen3_moe", ParallelLayout(tensor=2, data=2, sequence_parallel=True)),
        ("qwen3_moe", ParallelLayout(tensor=2, data=2, expert=4, sequence_parallel=True)),
    ],
    ids=str,
)
def test_save_hf_from_a_layout(gloo, tmp_path, family, layout):
    folder = write_hf(tmp_path / "hf", family, tied=True)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "run.json").write_text("{}")
    out = tmp_path / "out"
    assert gloo(layout.world_size, save_from_layout, folder, out, layout) == [None] * layout.world_size
    assert_identical(safetensors_of(out), safetensors_of(folder))
    assert torch.equal(hf_logits(out), hf_logits(folder))
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    carried = {"tokenizer.json", "chat_template.jinja", "generation_config.json"}
    assert {path.name for path in out.iterdir()} == carried | {"config.json", "model.safetensors"}
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode


def test_save_hf_in_several_files(gloo, tmp_path):
    folder = write_hf(tmp_path / "hf", "llama", tied=False)
    assert gloo(1, save_from_layout, folder, tmp_path / "out", ParallelLayout(), file_bytes=60_000) == [None]
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("model-*-of-*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 60_000 + 2_000
    assert torch.equal(hf_logits(tmp_path / "out"), hf_logits(folder))


def test_existing_output_is_refused_on_every_rank_or_replaced_when_asked(gloo, tmp_path):
    folder, layout = write_hf(tmp_path / "hf", "llama", tied=True), ParallelLayout(data=2, pipeline=2)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    messages = gloo(4, save_from_layout, folder, out, layout)
    assert all(m == f"{out} exists already: remove it or choose another output folder" for m in messages)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert gloo(4, save_from_layout, folder, out, layout, replace=True) == [None] * 4
    assert not (out / "mine.txt").exists() and torch.equal(hf_logits(out), hf_logits(folder))
