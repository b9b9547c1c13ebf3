"""GGUF -> Hugging Face on small files that the tests write."""

import json
import sys
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_opd.checkpoint.gguf_import import gguf_to_hf, split_rotary_pairs
from megatron_opd.errors import UserError
from tests.checkpoint.gguf_files import TEMPLATE, Q, interleave_rotary_halves, llama3_factors, write_gguf
from tests.checkpoint.models import FAMILIES, hf_logits, write_hf

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_hf(tmp_path_factory.mktemp("gguf") / "llama", "llama", tied=True)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_as_it_was(tmp_path, family, tied):
    source = write_hf(tmp_path / "source", family, tied=tied)
    gguf_to_hf(write_gguf(tmp_path / "tiny.gguf", source), tmp_path / "hf", dtype="fp32")
    assert torch.equal(hf_logits(tmp_path / "hf"), hf_logits(source))
    ours, theirs = AutoConfig.from_pretrained(tmp_path / "hf"), AutoConfig.from_pretrained(source)
    assert (ours.model_type, ours.architectures) == (theirs.model_type, theirs.architectures)


@pytest.mark.parametrize(
    ("quantised", "atol"), [(Q.F16, 1e-3), (Q.BF16, 8e-3), (Q.Q8_0, 1e-2), (Q.Q4_1, 6e-2)], ids=str
)
def test_quantised_tensors(tmp_path, llama, quantised, atol):
    line = gguf_to_hf(
        write_gguf(tmp_path / "tiny.gguf", llama, quantised=quantised), tmp_path / "hf", dtype="fp32"
    )
    assert f"12 {quantised.name}" in line
    expected, stored = load_file(llama / "model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    assert stored.keys() == expected.keys()
    for name, value in stored.items():
        rough = "mlp" in name
        torch.testing.assert_close(value, expected[name], atol=atol if rough else 0, rtol=0)
        assert not rough or not torch.equal(value, expected[name])


def test_transformers_reads_the_same_model_out_of_the_file(tmp_path, llama):
    write_gguf(tmp_path / "tiny.gguf", llama, quantised=Q.Q4_1)
    gguf_to_hf(tmp_path / "tiny.gguf", tmp_path / "hf")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    assert ours.dtype == torch.bfloat16
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value.bfloat16()), name
    for key in ("rope_parameters", "num_key_value_heads", "head_dim", "max_position_embeddings"):
        assert getattr(ours.config, key) == getattr(theirs.config, key)
    assert ours.config.rms_norm_eps == 1e-6  # the file holds the nearest float32


def test_several_files(tmp_path, llama):
    write_gguf(tmp_path / "tiny.gguf", llama)
    gguf_to_hf(tmp_path / "tiny.gguf", tmp_path / "hf", dtype="fp32", file_bytes=60_000)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 3
    assert torch.equal(hf_logits(tmp_path / "hf"), hf_logits(llama))


def test_tokenizer_chat_template_and_stop_id_come_along(tmp_path, llama):
    gguf_to_hf(write_gguf(tmp_path / "tiny.gguf", llama), tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("ab<|im_end|>").input_ids == [5, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.chat_template == TEMPLATE
    generation = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (2, 2)


def test_llama3_scaling_is_recognised_by_its_factors(tmp_path):
    source = write_hf(tmp_path / "source", "llama", tied=True, rope_parameters=LLAMA3)
    factors = llama3_factors(AutoConfig.from_pretrained(source))
    assert len(set(factors.tolist())) > 2  # some pairs unscaled, some between, some by the whole factor
    write_gguf(
        tmp_path / "tiny.gguf", source, tensors=lambda tensors: tensors.update({"rope_freqs.weight": factors})
    )
    gguf_to_hf(tmp_path / "tiny.gguf", tmp_path / "hf", dtype="fp32")
    assert AutoConfig.from_pretrained(tmp_path / "hf").rope_parameters == LLAMA3
    assert torch.equal(hf_logits(tmp_path / "hf"), hf_logits(source))


def add_scaling(writer: gguf.GGUFWriter, rope: dict) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


@pytest.mark.parametrize("rope", [LINEAR, YARN], ids=["linear", "yarn"])
def test_rope_scaling_in_the_metadata(tmp_path, rope):
    source = write_hf(tmp_path / "source", "qwen2", tied=False, rope_parameters=rope)
    write_gguf(tmp_path / "tiny.gguf", source, change=lambda writer: add_scaling(writer, rope))
    gguf_to_hf(tmp_path / "tiny.gguf", tmp_path / "hf", dtype="fp32")
    assert torch.equal(hf_logits(tmp_path / "hf"), hf_logits(source))


def refusal(source: Path) -> str:
    """The one line with which the file is refused; nothing may be left."""
    before = set(source.parent.iterdir())
    with pytest.raises(UserError) as caught:
        gguf_to_hf(source, source.parent / "out")
    assert set(source.parent.iterdir()) == before
    message = str(caught.value)
    assert "\n" not in message
    assert ".incomplete" not in message
    return message


def test_other_rope_factors_are_refused(tmp_path, llama):
    factors = numpy.array([1.0, 1.5, 2.0, 7.0], dtype=numpy.float32)
    path = write_gguf(
        tmp_path / "tiny.gguf", llama, tensors=lambda tensors: tensors.update({"rope_freqs.weight": factors})
    )
    assert refusal(path) == f"{path}: rope_freqs.weight is not the RoPE scaling of Llama 3"


def test_other_rope_scaling_is_refused(tmp_path, llama):
    path = write_gguf(
        tmp_path / "tiny.gguf",
        llama,
        change=lambda writer: add_scaling(writer, {"rope_type": "longrope", "factor": 2.0}),
    )
    assert f"{path}: RoPE scaling 'longrope' is not supported" in refusal(path)


def test_sliding_window_is_refused(tmp_path, llama):
    path = write_gguf(tmp_path / "tiny.gguf", llama, change=lambda writer: writer.add_sliding_window(32))
    assert f"{path}: sliding-window attention (32 positions) is not supported" in refusal(path)


def test_experts_in_a_llama_file_are_refused(tmp_path, llama):
    path = write_gguf(tmp_path / "tiny.gguf", llama, change=lambda writer: writer.add_expert_count(8))
    assert "experts are supported in files of architecture qwen3moe only, this one is llama" in refusal(path)


@pytest.mark.parametrize("share", [0, 0.0001, 0.01, 0.5, 0.999])
def test_truncated_file(tmp_path, llama, share):
    path = write_gguf(tmp_path / "tiny.gguf", llama)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert f"{path} is not a complete GGUF file" in refusal(path)


def test_not_a_gguf_file(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"not at all" * 100)
    assert f"{path} is not a complete GGUF file" in refusal(path)


def test_no_such_file(tmp_path):
    assert refusal(tmp_path / "tiny.gguf") == f"{tmp_path}/tiny.gguf: no such file"


def test_unsupported_architecture(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "tiny.gguf"), "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = refusal(tmp_path / "tiny.gguf")
    assert "GGUF architecture 'mamba' is not supported; supported: llama, qwen2, qwen3, qwen3moe" in message


def test_missing_unexpected_and_misshapen_tensors(tmp_path, llama):
    path = write_gguf(tmp_path / "a.gguf", llama, tensors=lambda tensors: tensors.pop("blk.1.attn_k.weight"))
    assert refusal(path) == f"{path}: blk.1.attn_k.weight is missing, the metadata imply shape [16, 64]"
    bias = numpy.zeros(16, dtype=numpy.float32)
    path = write_gguf(
        tmp_path / "b.gguf", llama, tensors=lambda tensors: tensors.update({"blk.1.attn_k.bias": bias})
    )
    assert refusal(path) == f"{path}: unexpected tensor blk.1.attn_k.bias, not part of this architecture"
    path = write_gguf(
        tmp_path / "c.gguf", llama, tensors=lambda tensors: tensors.update({"blk.1.attn_k.weight": bias})
    )
    assert "blk.1.attn_k.weight has shape [16], the metadata imply shape [16, 64]" in refusal(path)


def test_without_the_package_gguf(tmp_path, llama, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", llama)
    monkeypatch.setitem(sys.modules, "gguf", None)
    message = "reading GGUF files needs the package gguf: pip install 'megatron-opd[quickstart]'"
    assert refusal(path) == message


def test_code_beside_the_file_is_neither_run_nor_asked_about(tmp_path, llama, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "y")
    source = write_gguf(tmp_path / "tiny.gguf", llama)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert "cannot read its tokenizer" in refusal(source)
    assert not (tmp_path / "ran").exists()


def test_an_existing_folder_is_not_overwritten(tmp_path, llama):
    path = write_gguf(tmp_path / "tiny.gguf", llama)
    with pytest.raises(UserError, match="exists already"):
        gguf_to_hf(path, llama)


def test_splitting_rotary_pairs_undoes_the_interleaving():
    weight = torch.arange(48.0).view(24, 2)
    interleaved = torch.from_numpy(interleave_rotary_halves(weight.numpy(), 3).copy())
    assert not torch.equal(interleaved, weight)
    assert torch.equal(split_rotary_pairs(interleaved, 3), weight)
