"""Conversions hold one tensor at a time, and the safetensors files they write are what safetensors expects."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_opd.checkpoint.safetensors_files import INDEX_FILE, SINGLE_FILE, SafetensorsFiles, TensorSpec
from tools.bench.convert_memory import anonymous_bytes, measure, write_synthetic

CONSTANT = 64 * 2**20  # what a conversion may hold beside the largest tensor


def test_memory_is_the_largest_tensor_and_a_constant(tmp_path):
    """330 MB of weights, of which the largest is 80 MB, in files of 100 MB."""
    write_synthetic(tmp_path / "hf", layers=6, hidden=1024, ffn=4096, vocab=39_936, file_bytes=10**8)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    anonymous_bytes()  # whether this system tells it
    took = measure(tmp_path / "hf", tmp_path / "megatron", tmp_path / "back")
    for direction, measured in took.items():
        assert measured.model_bytes > 3 * 10**8 and measured.largest_bytes < 9 * 10**7
        assert measured.largest_bytes / 2 < measured.peak_bytes, direction
        assert measured.peak_bytes < measured.largest_bytes + CONSTANT, direction


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=40, deadline=None)
@given(tensors=st.lists(st.tuples(SHAPES, DTYPES), min_size=1, max_size=8), file_bytes=st.integers(1, 500))
def test_safetensors_loads_what_was_written_in_any_order(tmp_path_factory, tensors, file_bytes):
    folder = tmp_path_factory.mktemp("files")
    made = {f"t{index}": numbers(shape, dtype, index) for index, (shape, dtype) in enumerate(tensors)}
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()]
    files = SafetensorsFiles(folder, specs, file_bytes)
    files.create()
    for name in reversed(made):
        files.write(name, made[name])
    weights = sorted(folder.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in weights) == files.nbytes
    found: dict[str, torch.Tensor] = {}
    for path in weights:
        content = load_file(path)
        assert not found.keys() & content.keys()
        assert len(content) == 1 or sum(tensor.nbytes for tensor in content.values()) <= file_bytes
        if (folder / INDEX_FILE).exists():
            weight_map = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
            assert {name for name, file in weight_map.items() if file == path.name} == content.keys()
        found |= content
    assert (len(weights) == 1) == (folder / SINGLE_FILE).exists() == (not (folder / INDEX_FILE).exists())
    assert found.keys() == made.keys()
    for name, tensor in made.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


@pytest.mark.parametrize("turned", [False, True])
def test_a_tensor_is_cast_in_blocks(tmp_path, turned):
    tensor = torch.randn(3000, 3001)  # more than two blocks
    tensor = tensor.T if turned else tensor
    files = SafetensorsFiles(tmp_path, [TensorSpec("x", tuple(tensor.shape), torch.bfloat16)])
    files.create()
    files.write("x", tensor)
    assert torch.equal(load_file(tmp_path / SINGLE_FILE)["x"], tensor.bfloat16())
