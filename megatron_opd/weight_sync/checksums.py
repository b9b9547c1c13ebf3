"""Whether servers have the weights that were sent: SGLang's checksums of its tensors against those of the export.

A server on a CPU hashes with SHA-256, which is repeated here from the exported files, for the tensors of the first and
the last layer. A server on a GPU hashes by a kernel of its own: then the servers are compared with each other.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opd.checkpoint.hf_import import HfReader
from megatron_opd.errors import UserError

# SGLang's tensor in a layer -> the Hugging Face tensors that it is stacked from.
_IN_A_LAYER = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "post_attention_layernorm.weight": ("post_attention_layernorm.weight",),
    "self_attn.qkv_proj.weight": tuple(f"self_attn.{name}_proj.weight" for name in "qkv"),
    "self_attn.o_proj.weight": ("self_attn.o_proj.weight",),
    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.down_proj.weight": ("mlp.down_proj.weight",),
}


def checksum(tensor: Tensor) -> str:
    """SGLang's of a tensor on a CPU: the first 8 bytes of the SHA-256 of its memory, as hexadecimal digits."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.data).hexdigest()[:16]


def exported_checksums(folder: Path, layers: int) -> dict[str, str]:
    """By SGLang's names, for the final norm and the dense tensors of the first and the last layer of an export."""
    reader = HfReader(folder)
    sources: dict[str, tuple[str, ...]] = {"model.norm.weight": ("model.norm.weight",)}
    for layer in {0, layers - 1}:
        prefix = f"model.layers.{layer}."
        sources |= {
            prefix + name: tuple(prefix + part for part in parts) for name, parts in _IN_A_LAYER.items()
        }
    return {
        name: checksum(torch.cat([reader.read(part, 0, 0, reader.shape(part)[0]) for part in parts]))
        for name, parts in sources.items()
        if reader.names.issuperset(parts)
    }


def check_servers(sums: Mapping[str, Any], exported: Mapping[str, str] | None) -> None:
    """Compare the answers of /weights_checker, by URL, with each other and with the exported tensors (None: don't).

    Tensors that a server shards are left out. Raises UserError naming the server and the tensor that differs.
    """
    first: tuple[str, list[dict[str, str]]] | None = None
    for url, answer in sums.items():
        ranks = [rank["checksums"] for rank in answer["ranks"]]
        first = first or (url, ranks)
        for ours, theirs in zip(ranks, first[1], strict=False):
            _compare(url, ours, theirs, first[0])
        if exported is not None:
            whole = [name for name in exported if len(ranks) == 1 or name.endswith("norm.weight")]
            for found in ranks:
                _compare(url, found, {name: exported[name] for name in whole}, "the trainer")


def _compare(url: str, found: Mapping[str, str], expected: Mapping[str, str], whose: str) -> None:
    differing = sorted(name for name in expected if name in found and found[name] != expected[name])
    if differing:
        raise UserError(
            f"rollout.sglang: after the weight sync {differing[0]} and {len(differing) - 1} more tensors of {url} "
            f"differ from those of {whose}: do both read the same folder?"
        )
