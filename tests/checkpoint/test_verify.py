"""Comparing folders: what is the same passes, what differs a little is found, and each mistake is one line."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from megatron_opd.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_opd.checkpoint.sample_tokens import CONVERSATIONS
from megatron_opd.checkpoint.verify import (
    EXACT,
    ROUNDED,
    ROUNDED_WEIGHTS,
    compare_logits,
    verify_logits,
)
from megatron_opd.checkpoint.verify_tensors import verify_tensors
from megatron_opd.cli import main
from megatron_opd.errors import UserError
from tests.checkpoint.models import FAMILIES, write_hf

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def add_tokenizer(folder: Path, *, order: int = 1, template: str | None = TEMPLATE) -> Path:
    """A tokenizer of 256 bytes (backwards with `order` -1)."""
    model = BPE(vocab={byte: index for index, byte in enumerate(BYTES[::order])}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template).save_pretrained(folder)
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **settings: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A Hugging Face folder with a tokenizer, and the Megatron folder made of it."""
    folder = tmp_path_factory.mktemp("pair")
    hf = write_hf(folder / "hf", "qwen2", tied=True, vocab_size=300, max_position_embeddings=512)
    add_tokenizer(hf)
    hf_to_megatron(hf, folder / "megatron")
    return hf, folder / "megatron"


@pytest.fixture
def copy(pair, tmp_path) -> Path:
    """A copy of the Hugging Face folder, to be spoilt."""
    return Path(shutil.copytree(pair[0], tmp_path / "copy"))


def test_the_numbers_of_a_comparison():
    first = torch.tensor([[0.0, 0.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 5.0], [1.0, 2.0, 3.0]])
    second = first.clone()
    second[1] = torch.tensor([3.0, 1.5, 0.0])
    second[2] = torch.tensor([6.0, 0.0, 5.0])
    found = compare_logits(first, second)
    assert (found.max_difference, found.worst_position, found.worst_id) == (6.0, 2, 0)
    assert found.top1_agreement == 0.75
    kl = [
        torch.nn.functional.kl_div(b.log_softmax(-1), a.softmax(-1), reduction="sum").item()
        for a, b in zip(first.double(), second.double(), strict=True)
    ]
    assert found.max_kl == pytest.approx(max(kl), rel=1e-12)
    assert found.mean_kl == pytest.approx(sum(kl) / 4, rel=1e-12)


def test_a_nan_is_never_within_a_tolerance():
    logits = torch.zeros(3, 4)
    spoilt = logits.clone()
    spoilt[1, 2] = math.nan
    found = compare_logits(logits, spoilt)
    assert (found.worst_position, found.worst_id) == (1, 2)
    assert not found.within(ROUNDED)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversion_and_back_is_the_same(tmp_path, family, tied):
    hf, megatron, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    write_hf(hf, family, tied=tied)
    hf_to_megatron(hf, megatron)
    megatron_to_hf(megatron, back)
    outcome = verify_logits(hf, megatron)
    assert outcome.passed and outcome.tolerance == EXACT
    assert verify_tensors(hf, megatron).passed
    assert verify_tensors(hf, back).passed
    assert verify_tensors(hf, back).tensors == len(load_file(hf / "model.safetensors"))


def test_the_report(pair):
    report = verify_logits(*pair, tokens=100).describe()
    assert f"A  {pair[0]} (Hugging Face, run by transformers, stored in float32)" in report
    assert f"B  {pair[1]} (Megatron, run by megatron-core, stored in float32)" in report
    assert "100 tokens of built-in conversations, computed in fp32" in report
    assert "top-1 agreement  100.00%" in report


def test_the_text_goes_through_the_chat_template(pair):
    sample = verify_logits(*pair, tokens=40).sample
    assert sample.tokenizer is not None
    assert sample.tokenizer.decode(sample.ids) == f"<user>{CONVERSATIONS[0][0]}"[:40]


def test_without_a_chat_template_the_text_is_plain(copy):
    (copy / "chat_template.jinja").unlink()
    sample = verify_logits(copy, copy, tokens=20).sample
    assert sample.tokenizer is not None
    assert sample.tokenizer.decode(sample.ids) == CONVERSATIONS[0][0][:20]


def test_conversations_repeat_up_to_the_positions_of_the_model(tmp_path):
    folder = write_hf(tmp_path / "hf", "llama", tied=True, vocab_size=256, max_position_embeddings=2048)
    add_tokenizer(folder)
    assert len(verify_logits(folder, folder, tokens=4000).sample.ids) == 2048


def test_text_from_a_file(pair, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Größe")
    sample = verify_logits(*pair, text=text).sample
    assert sample.tokenizer is not None
    assert sample.tokenizer.decode(sample.ids) == "Größe"
    assert sample.describe() == f"7 tokens of {text}"


def test_random_ids_without_a_tokenizer(tmp_path):
    folder = write_hf(tmp_path / "hf", "llama", tied=True)
    outcome = verify_logits(folder, folder)
    assert "64 random ids (neither folder holds a tokenizer)" in outcome.describe()
    assert int(outcome.sample.ids.max()) > 100


def test_a_checkpoint_of_a_run(run_checkpoint, tmp_path):
    megatron_to_hf(run_checkpoint, tmp_path / "hf")
    assert verify_logits(run_checkpoint, tmp_path / "hf").passed
    assert verify_tensors(run_checkpoint, tmp_path / "hf").passed
    assert not verify_logits(run_checkpoint, run_checkpoint.parents[1] / "student-True").passed


def swap_heads(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name].roll(8, 0)


def nudge(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.3.mlp.up_proj.weight"][5, 7] += 0.01


@pytest.mark.parametrize("damage", [swap_heads, nudge])
def test_a_damaged_tensor_is_found(pair, copy, damage):
    change_tensors(copy, damage)
    assert not verify_logits(copy, pair[1]).passed
    outcome = verify_tensors(copy, pair[1])
    assert len(outcome.differences) == 1


@pytest.mark.parametrize(
    "setting", [{"rms_norm_eps": 1e-3}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}]
)
def test_a_wrong_setting_is_found(pair, copy, setting):
    change_config(copy, **setting)
    assert not verify_logits(copy, pair[1]).passed
    assert verify_tensors(copy, pair[1]).passed


def test_every_bit_counts(pair, copy):
    name = "model.layers.2.mlp.down_proj.weight"
    change_tensors(copy, lambda tensors: tensors[name][0, 0].zero_())
    twin = Path(shutil.copytree(copy, copy.parent / "twin"))
    change_tensors(twin, lambda tensors: tensors[name][0, 0].neg_())
    assert verify_tensors(copy, twin).differences == [f"{name}: 1 of 6144 numbers differ, by at most 0"]


def test_bf16_is_judged_by_its_own_tolerance(pair, tmp_path):
    hf_to_megatron(pair[0], tmp_path / "rounded", dtype="bf16")
    outcome = verify_logits(pair[0], tmp_path / "rounded")
    assert outcome.tolerance == ROUNDED_WEIGHTS
    assert outcome.comparison.max_difference > 0
    assert verify_logits(tmp_path / "rounded", pair[1], precision="bf16").tolerance == ROUNDED
    line = "model.embed_tokens.weight: float32 and bfloat16"
    assert verify_tensors(pair[0], tmp_path / "rounded").differences[0] == line


def test_bf16_weights_are_exact_in_fp32(pair, tmp_path):
    hf_to_megatron(pair[0], tmp_path / "rounded", dtype="bf16")
    megatron_to_hf(tmp_path / "rounded", tmp_path / "hf")
    outcome = verify_logits(tmp_path / "rounded", tmp_path / "hf")
    assert outcome.passed and outcome.tolerance == EXACT
    assert outcome.stored == ("bfloat16", "bfloat16")


def refusal(first: Path, second: Path, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        verify_logits(first, second, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_different_vocabularies(pair, tmp_path):
    other = write_hf(tmp_path / "other", "llama", tied=True, vocab_size=280)
    message = f"{pair[0]} and {other} have different vocabularies: 300 and 280 tokens"
    assert refusal(pair[0], other) == message


def test_different_tokenizers(pair, copy):
    add_tokenizer(copy, order=-1)
    message = f"{pair[1]} and {copy} have different tokenizers: their ids do not mean the same"
    assert refusal(pair[1], copy) == message


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path):
    folder = add_tokenizer(write_hf(tmp_path / "hf", "llama", tied=True))
    assert f"the tokenizer of {folder} makes ids up to" in refusal(folder, folder)


def test_text_without_a_tokenizer(tmp_path):
    folder = write_hf(tmp_path / "hf", "llama", tied=True)
    assert "without one --text cannot be used" in refusal(folder, folder, text=tmp_path / "text.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"\xff\xfe", "cannot be read"), (b"", "holds no text")],
)
def test_a_text_that_is_none(pair, tmp_path, content, message):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    assert f"{text} {message}" in refusal(*pair, text=text)


def test_a_chat_template_that_fails(copy):
    add_tokenizer(copy, template="{{ raise_exception('no users here') }}")
    assert f"{copy}: the chat template fails (no users here)" in refusal(copy, copy)


def test_a_broken_folder_is_refused_before_anything_is_run(pair, copy):
    change_tensors(copy, lambda tensors: tensors.pop("model.norm.weight"))
    assert (
        refusal(pair[1], copy) == f"{copy} lacks the tensor model.norm.weight that its config.json calls for"
    )


def test_tensors_of_models_of_different_shapes(pair, tmp_path):
    other = write_hf(tmp_path / "other", "qwen2", tied=True, vocab_size=300, num_hidden_layers=3)
    with pytest.raises(
        UserError, match=r"models of different shapes: model.layers.3.* is \[64\] there, none here"
    ):
        verify_tensors(pair[1], other)


@pytest.mark.parametrize(
    ("options", "code", "out", "err"),
    [
        ([], 0, "the same, within the tolerance", ""),
        (["--tensors"], 0, "identical, bit for bit: 50 tensors, ", ""),
        (["--atol", "0", "--kl", "0", "--dtype", "bf16"], 1, "tolerance        max |A - B| 0, ", "error: "),
        (["--text", "missing.txt"], 2, "", "error: missing.txt cannot be read"),
    ],
)
def test_command(pair, capfd, options, code, out, err):
    with pytest.raises(SystemExit) as caught:
        main(["convert", "verify", *map(str, pair), *options])
    printed = capfd.readouterr()
    assert (caught.value.code or 0) == code
    assert out in printed.out
    assert err in printed.err and "Traceback" not in printed.err


def test_command_names_the_tensors_that_differ(pair, copy, capfd):
    change_tensors(copy, nudge)
    with pytest.raises(SystemExit) as caught:
        main(["convert", "verify", "--tensors", str(copy), str(pair[1])])
    printed = capfd.readouterr()
    assert caught.value.code == 1
    assert printed.out == "model.layers.3.mlp.up_proj.weight: 1 of 6144 numbers differ, by at most 0.01\n"
    assert f"error: {copy} and {pair[1]} differ in 1 of 50 tensors" in printed.err
