"""The LM head alone, cut for any layout, from folders of both kinds."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_opd.checkpoint.convert import hf_to_megatron
from megatron_opd.checkpoint.head import load_head
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import read_architecture
from tests.tiny import VOCAB, save_tiny_model


@pytest.mark.parametrize("tied", [True, False])
def test_every_shard_of_every_padding(tmp_path: Path, tied: bool) -> None:
    save_tiny_model(tmp_path / "hf", layers=1, tied=tied)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    expected = load_file(tmp_path / "hf" / "model.safetensors")[name]
    for folder in (tmp_path / "hf", tmp_path / "megatron"):
        arch = read_architecture(folder)
        for ranks, padded in ((1, 256), (2, 512), (3, 384)):
            shards = [
                load_head(
                    folder,
                    arch,
                    tp_rank=rank,
                    tp_size=ranks,
                    padded_vocab_size=padded,
                    dtype=torch.float32,
                )
                for rank in range(ranks)
            ]
            whole = torch.cat(shards)
            assert torch.equal(whole[:VOCAB], expected) and whole.shape == (padded, 64)
            assert not whole[VOCAB:].any()


def test_a_folder_without_that_head(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "hf", layers=1, tied=True)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    shape = {"tp_rank": 0, "tp_size": 1, "padded_vocab_size": 256}
    for folder, missing in (
        ("hf", "lacks the tensor lm_head.weight"),
        ("megatron", "lacks the tensor output_layer"),
    ):
        path = tmp_path / folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
        with pytest.raises(UserError, match=missing):
            load_head(tmp_path / folder, read_architecture(tmp_path / folder), **shape, dtype=torch.float32)
