"""Whether servers have the weights that were sent: SGLang's checksums of its tensors against those of the trainer's.

A server on a CPU hashes with SHA-256, which is repeated here for some of the tensors that go out. A server on a GPU
hashes by a kernel of its own: then the servers are compared with each other.
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


class SampleChecksums:
    """SGLang's checksums of the final norm and the dense tensors of the first and the last layer.

    Made of the Hugging Face tensors as they come by, in any dtype; those that are stacked come in order.
    """

    def __init__(self, layers: int) -> None:
        self._sources: dict[str, tuple[str, ...]] = {"model.norm.weight": ("model.norm.weight",)}
        for layer in {0, layers - 1}:
            prefix = f"model.layers.{layer}."
            self._sources |= {
                prefix + name: tuple(prefix + part for part in parts) for name, parts in _IN_A_LAYER.items()
            }
        self._stacked_in = {part: name for name, parts in self._sources.items() for part in parts}
        self.clear()

    def clear(self) -> None:
        """Forget all tensors."""
        self._digests = {name: hashlib.sha256() for name in self._sources}
        self._added = dict.fromkeys(self._sources, 0)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in a Hugging Face tensor, if it is one of the sample."""
        if name not in self._stacked_in:
            return
        stack = self._stacked_in[name]
        assert self._sources[stack].index(name) == self._added[stack], f"{name} comes out of order"
        self._added[stack] += 1
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._digests[stack].update(data.data)

    def add_folder(self, folder: Path) -> None:
        """Take in the tensors of an export."""
        self.clear()
        reader = HfReader(folder)
        for name in self._stacked_in:
            if name in reader.names:
                self.add(name, reader.read(name, 0, 0, reader.shape(name)[0]))

    def sums(self) -> dict[str, str]:
        """By SGLang's names: the first 8 bytes of the SHA-256 of a tensor's memory, as hexadecimal digits.

        Only of tensors whose parts have all been there.
        """
        whole = [name for name, parts in self._sources.items() if self._added[name] == len(parts)]
        return {name: self._digests[name].hexdigest()[:16] for name in whole}


def check_servers(sums: Mapping[str, Any], sent: Mapping[str, str] | None) -> None:
    """Compare the answers of /weights_checker, by URL, with each other and with what was sent (None: don't).

    Tensors that a server shards are left out. Raises UserError naming the server and the tensor that differs.
    """
    first: tuple[str, list[dict[str, str]]] | None = None
    for url, answer in sums.items():
        ranks = [rank["checksums"] for rank in answer["ranks"]]
        first = first or (url, ranks)
        for ours, theirs in zip(ranks, first[1], strict=False):
            _compare(url, ours, theirs, first[0])
        if sent is not None:
            whole = [name for name in sent if len(ranks) == 1 or name.endswith("norm.weight")]
            for found in ranks:
                _compare(url, found, {name: sent[name] for name in whole}, "the trainer")


def _compare(url: str, found: Mapping[str, str], expected: Mapping[str, str], whose: str) -> None:
    differing = sorted(name for name in expected if name in found and found[name] != expected[name])
    if differing:
        raise UserError(
            f"rollout.sglang: after the weight sync {differing[0]} and {len(differing) - 1} more tensors of {url} "
            f"differ from those of {whose}: do all load the same weights, in the dtype of `precision`?"
        )
