"""The tables of names and layouts against an independent implementation, mbridge.

Only mbridge's naming and formatting is used: its own model builder needs transformer-engine, whose fused
parameter names differ from the local layer spec's in the two norms of a layer and in the experts.
"""

import re

import pytest
import torch
from mbridge.core.parallel_states import ParallelStates
from mbridge.models.llama import LLaMABridge
from mbridge.models.qwen2 import Qwen2Bridge
from mbridge.models.qwen3 import Qwen3Bridge
from mbridge.models.qwen3moe import Qwen3MoEBridge
from transformers import AutoConfig

from megatron_opd.checkpoint.hf_families import hf_from_shards, model_weights, shard_from_hf
from megatron_opd.models.architecture import read_architecture
from tests.checkpoint.models import write_hf

BRIDGES = {"llama": LLaMABridge, "qwen2": Qwen2Bridge, "qwen3": Qwen3Bridge, "qwen3_moe": Qwen3MoEBridge}
FUSED = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",  # not where experts follow
}
PADDED = 256


def bridge_for(family, folder):
    """mbridge's object for the folder, without a model or process groups."""
    cls = BRIDGES[family]
    # mbridge edits this dict of the class for tied models, which would leak into the next test
    copied = {"_DIRECT_MAPPING": dict(cls._DIRECT_MAPPING)}
    config = AutoConfig.from_pretrained(folder)
    bridge = type(cls.__name__, (cls,), copied)(config, torch.float32, ParallelStates(), 128)
    bridge.vocab_size, bridge.padded_vocab_size = config.vocab_size, PADDED
    return bridge


def mbridge_name(name: str, family: str) -> str:
    """The name in transformer-engine's layers, experts as parameters of one grouped matrix product."""
    for local, fused in FUSED.items():
        if name.endswith(local) and (family, local) != ("qwen3_moe", ".pre_mlp_layernorm.weight"):
            return name.removesuffix(local) + fused
    return re.sub(r"experts\.local_experts\.(\d+)\.(linear_fc\d)\.weight", r"experts.\2.weight\1", name)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", BRIDGES)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_names_and_shards_equal_mbridge(tmp_path, family, tied, tp_size):
    folder = write_hf(tmp_path / "hf", family, tied=tied)
    arch, bridge = read_architecture(folder), bridge_for(family, folder)
    count = 0
    for weight in model_weights(arch):
        shapes = weight.shapes(arch.dimensions)
        tensors = {name: torch.randn(shape) for name, shape in shapes.items()}

        def read(name, dim, start, stop, tensors=tensors):
            return tensors[name].narrow(dim, start, stop - start)

        shards = [
            shard_from_hf(weight, arch, read, tp_rank=rank, tp_size=tp_size, padded_vocab_size=PADDED)
            for rank in range(tp_size)
        ]
        name = mbridge_name(weight.megatron, family)
        # mbridge knows no tied Llama and no tied Qwen3-MoE
        if name != "output_layer.weight" or not tied or family in ("qwen2", "qwen3"):
            assert bridge._weight_name_mapping_mcore_to_hf(name) == list(shapes), name
        full = bridge._weight_to_mcore_format(name, list(tensors.values()))
        if weight.expert is None:
            expected = bridge._weight_split_across_tp(name, full, shards[0], tp_size)
        else:
            expected = [full] * tp_size  # experts are not cut
        for shard, theirs in zip(shards, expected, strict=True):
            assert torch.equal(shard, theirs), name
        for tensor, original in zip(hf_from_shards(weight, arch, shards), tensors.values(), strict=True):
            assert torch.equal(tensor, original), name
        count += 1
    per_layer = {"llama": 6, "qwen2": 7, "qwen3": 8, "qwen3_moe": 7 + 4 * 2}[family]
    assert count == 3 + 4 * per_layer
