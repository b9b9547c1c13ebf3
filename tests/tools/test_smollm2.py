"""GGUF -> Hugging Face on a tiny file that the test writes; the real model is checked where it is
installed."""

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_opd.errors import UserError
from tools.smollm2 import GLOBAL_NAMES, LAYER_NAMES, hf_name, split_rotary_pairs, write_hf_folder

HEADS, GROUPS, HIDDEN, LAYERS = 4, 2, 32, 2
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def interleave_rotary_halves(weight, heads):
    """What llama.cpp does to query and key rows: (half, pair) -> (pair, half) within each head."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path, model):
    """The model as llama.cpp's converter writes it, in float32 and Q4_1."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_vocab_size(6)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"])
    writer.add_token_types([3, 3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    add_tensors(writer, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensors(writer, model):
    gguf_names = {hf: name for name, hf in GLOBAL_NAMES.items()}
    for layer in range(LAYERS):
        for module in LAYER_NAMES:
            name = f"blk.{layer}.{module}.weight"
            gguf_names[hf_name(name)] = name
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = value.numpy()
        if "q_proj" in name or "k_proj" in name:
            array = interleave_rotary_halves(array, HEADS if "q_proj" in name else GROUPS)
        if "mlp" in name:
            packed = gguf.quantize(numpy.ascontiguousarray(array), gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(gguf_names[name], packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(gguf_names[name], numpy.ascontiguousarray(array))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    model = tiny_llama()
    write_gguf(folder / "tiny.gguf", model)
    write_hf_folder(folder / "tiny.gguf", folder / "hf")
    return folder, model


def test_the_weights_are_those_of_the_model_in_bfloat16(written):
    folder, model = written
    stored = load_file(folder / "hf" / "model.safetensors")
    assert stored.keys() == model.state_dict().keys() - {"lm_head.weight"}
    for name, value in stored.items():
        expected = model.state_dict()[name]
        assert value.dtype == torch.bfloat16
        # Q4_1 has 16 levels between the least and the greatest of 32 weights.
        atol, rtol = (0.06, 0.0) if "mlp" in name else (1e-6, 2**-8)
        torch.testing.assert_close(value.float(), expected, atol=atol, rtol=rtol)


def test_transformers_reads_the_same_weights_out_of_the_gguf(written):
    folder, _ = written
    ours = AutoModelForCausalLM.from_pretrained(folder / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf")
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value.bfloat16()), name
    for key in ("rope_parameters", "num_key_value_heads", "head_dim", "max_position_embeddings"):
        assert getattr(ours.config, key) == getattr(theirs.config, key)
    assert ours.config.rms_norm_eps == 1e-5


def test_tokenizer_chat_template_and_stop_id_come_along(written):
    folder, _ = written
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.chat_template == TEMPLATE
    assert AutoModelForCausalLM.from_pretrained(folder / "hf").generation_config.eos_token_id == 2


def test_an_existing_folder_is_not_overwritten(written):
    folder, _ = written
    with pytest.raises(UserError, match="exists already"):
        write_hf_folder(folder / "tiny.gguf", folder / "hf")


def test_splitting_rotary_pairs_undoes_the_interleaving():
    weight = torch.arange(48.0).view(24, 2)
    interleaved = torch.from_numpy(interleave_rotary_halves(weight.numpy(), 3).copy())
    assert not torch.equal(interleaved, weight)
    assert torch.equal(split_rotary_pairs(interleaved, 3), weight)
