"""The quickstart's model: taken out of its package and stored as a Hugging Face folder, in bfloat16."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.checkpoint.gguf_files import TEMPLATE, Q, write_gguf
from tests.checkpoint.models import write_hf
from tools import smollm2


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model in place of the package's."""
    source = write_hf(tmp_path / "source", "llama", tied=True)
    path = write_gguf(tmp_path / "tiny.gguf", source, quantised=Q.Q4_1)
    monkeypatch.setattr(smollm2, "package_file", lambda package, version, ending: path)
    return path


def test_the_folder_is_a_model_with_tokenizer_and_stop_id(packaged, tmp_path):
    assert smollm2.main([str(tmp_path / "hf")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template == TEMPLATE


def test_mistakes_end_with_2(packaged, tmp_path, capsys):
    assert smollm2.main([]) == 2
    assert "usage:" in capsys.readouterr().err
    assert smollm2.main([str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
