"""What `convert inspect` says about a folder."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_opd.checkpoint.convert import hf_to_megatron
from megatron_opd.checkpoint.inspection import describe_folder
from megatron_opd.cli import main
from megatron_opd.errors import UserError
from tests.checkpoint.models import hf_model, write_hf
from tests.checkpoint.test_verify import add_tokenizer


def rows(report: str) -> dict[str, str]:
    """The first part of a report: label -> text."""
    return dict(line.split(maxsplit=1) for line in report.partition("\n\n")[0].splitlines())


def tensor_lines(report: str) -> list[list[str]]:
    return [line.rsplit(maxsplit=2) for line in report.partition("\n\n")[2].splitlines()[1:]]


def test_hugging_face_folder(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
    folder = write_hf(tmp_path / "hf", "llama", tied=True, rope_parameters=rope)
    found = rows(describe_folder(folder))
    assert found["kind"] == "Hugging Face folder"
    assert found["family"] == "llama"
    assert found["sizes"] == "4 layers, hidden 64, FFN 96, 8 heads of 8, 2 key/value groups"
    assert found["vocabulary"] == "131 tokens, 64 positions"
    assert found["details"] == "tied embeddings, no QKV bias, no QK norm"
    assert found["RoPE"] == "linear, theta 10,000, factor 2.5"
    assert found["parameters"] == f"{sum(p.numel() for p in hf_model(folder).parameters()):,}"
    assert found["tokenizer"] == "none"
    size = (folder / "model.safetensors").stat().st_size
    assert found["files"].endswith(f": model.safetensors {size:,} bytes")


def test_every_tensor_of_a_hugging_face_folder(tmp_path):
    folder = write_hf(tmp_path / "hf", "qwen2", tied=False)
    expected = load_file(folder / "model.safetensors")
    lines = tensor_lines(describe_folder(folder, tensors=True))
    assert {line[0].split()[0]: (line[1], line[2]) for line in lines} == {
        name: ("float32", f"{tensor.nbytes:,}") for name, tensor in expected.items()
    }
    assert "QKV bias" in rows(describe_folder(folder))["details"]


def test_several_files(tmp_path):
    folder = write_hf(tmp_path / "hf", "llama", tied=True, max_shard_size="40KB")
    files = sorted(folder.glob("*.safetensors"))
    found = rows(describe_folder(folder))["files"]
    assert found.startswith(f"{len(files)}, ") and found.endswith(f": {files[0].name} ... {files[-1].name}")


def test_parameters_that_a_token_uses(tmp_path):
    folder = write_hf(tmp_path / "hf", "qwen3_moe", tied=True)
    model = hf_model(folder)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    config: Any = model.config
    active = total - experts + experts * config.num_experts_per_tok // config.num_experts
    found = rows(describe_folder(folder))
    assert found["parameters"] == f"{total:,}, of which a token uses {active:,}"
    assert found["experts"] == (
        f"{config.num_experts} of FFN {config.moe_intermediate_size} in every layer, "
        f"{config.num_experts_per_tok} a token"
    )


def test_tokenizer(tmp_path):
    folder = add_tokenizer(write_hf(tmp_path / "hf", "llama", tied=True, vocab_size=256))
    assert rows(describe_folder(folder))["tokenizer"] == "256 tokens, chat template"


def test_megatron_folder(tmp_path):
    folder = write_hf(tmp_path / "hf", "qwen3", tied=True)
    hf_to_megatron(folder, tmp_path / "megatron", dtype="bf16")
    report = describe_folder(tmp_path / "megatron")
    found = rows(report)
    assert found["kind"] == "Megatron folder (state/, loads at any layout)"
    assert found["optimizer"] == "none"
    assert "in bfloat16" in found["weights"]
    lines = {line[0].split()[0]: line for line in tensor_lines(report)}
    name = "embedding.word_embeddings.weight"
    assert lines[name][0].endswith("[256, 64]") and lines[name][1:] == ["bfloat16", "32,768"]
    assert any(line[0].endswith("[4, 192, 64]") for line in lines.values())  # gate and up of all layers


def test_a_checkpoint_of_a_run_has_an_optimizer_beside_the_model(run_checkpoint):
    report = describe_folder(run_checkpoint)
    assert "in float32" in rows(report)["optimizer"]
    assert not any("optimizer" in line[0] for line in tensor_lines(report))
    everything = tensor_lines(describe_folder(run_checkpoint, tensors=True))
    assert any("optimizer" in line[0] for line in everything)


def test_a_broken_folder_is_one_line(tmp_path):
    folder = write_hf(tmp_path / "hf", "llama", tied=True)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        describe_folder(folder)


@pytest.mark.parametrize(("name", "code"), [("hf", 0), ("missing", 2)])
def test_command(tmp_path, capfd, name, code):
    write_hf(tmp_path / "hf", "llama", tied=True)
    with pytest.raises(SystemExit) as caught:
        main(["convert", "inspect", str(Path(tmp_path / name)), "--tensors"])
    printed = capfd.readouterr()
    assert (caught.value.code or 0) == code
    assert ("model.norm.weight" in printed.out) == (code == 0)
    assert ("error: model folder not found" in printed.err) == (code == 2)
