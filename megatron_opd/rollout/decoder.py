"""The forward pass of this rank's model chunks with cached keys and values, on the training model's own parameters.

The same mathematics as the training forward (`models.layers`): float32 residual stream, RMSNorm computed in its
input's dtype, rotary embedding applied in the compute dtype. Weights are read afresh for every `StageDecoder`.

Shapes: N tokens (all prompt tokens, packed, or one a sequence), H hidden size, G key/value groups and R query heads a
group on this rank, D head size, V padded vocabulary, TP tensor-parallel size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_opd.models.architecture import Architecture
from megatron_opd.models.attention import PackedAttention
from megatron_opd.models.gpt import GPT
from megatron_opd.rollout.feed_forward import FeedForward, read_feed_forward
from megatron_opd.rollout.kv_cache import KVCache
from megatron_opd.rollout.projection import Projection, project

# layer, query [N, G, R, D], key [N, G, D], value [N, G, D] -> attention output [N, G * R * D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Layer:
    attention_norm: Tensor  # norms of the residual stream in its dtype, float32
    qkv: Projection
    query_norm: Tensor | None
    key_norm: Tensor | None
    attention_out: Projection
    mlp_norm: Tensor
    feed_forward: FeedForward


class StageDecoder:
    """This rank's layers with their present weights; `rows` is how many sequences will be decoded together.

    Layers are numbered through all chunks of the rank; a pass goes through one chunk at a time.
    Make it anew when the weights have changed: collective over `groups.ep` for a model with experts, of which a
    replica then holds all (`feed_forward`). Collectives of a pass under TP > 1: 1 all-reduce [N, H] for the
    embedding (first stage) and 2 a layer.
    """

    def __init__(
        self, chunks: Sequence[GPT], arch: Architecture, groups: ProcessGroupCollection, *, rows: int
    ) -> None:
        tp, first, last = groups.tp, chunks[0], chunks[-1]
        self._model, self._tp, self._eps = first, tp, arch.norm_eps
        self.head_dim = arch.head_dim
        self.groups = arch.num_kv_groups // tp.size()
        self.heads_per_group = arch.num_heads // arch.num_kv_groups
        self.layers = [_read_layer(layer, groups, rows) for chunk in chunks for layer in chunk.decoder.layers]
        self.chunks = len(chunks)
        self._softmax_scale = first.config.softmax_scale
        self._prompt_attention = PackedAttention(first.config, self._softmax_scale)
        if first.pre_process:
            self._embedding_VH = first.embedding.word_embeddings.weight.detach()
        if last.post_process:
            self._final_norm = last.decoder.final_layernorm.weight.detach()
            self._head = project(last.head_weight, rows=rows)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights, queries, keys and values."""
        return next(self._model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self._model.parameters()).device

    def embed(self, tokens_N: Tensor) -> Tensor:
        """The residual stream [N, H] at the model's entrance, float32. First stage only."""
        if self._tp.size() == 1:
            return F.embedding(tokens_N, self._embedding_VH).float()
        rows = self._embedding_VH.size(0)
        local_N = tokens_N - rows * self._tp.rank()
        elsewhere_N = (local_N < 0) | (local_N >= rows)
        hidden_NH = F.embedding(local_N.masked_fill(elsewhere_N, 0), self._embedding_VH)
        return self._sum(hidden_NH.masked_fill_(elsewhere_N[:, None], 0)).float()

    def logits_shard(self, residual_NH: Tensor) -> Tensor:
        """Logits [N, V/TP] of this rank's vocabulary rows, in the weight's dtype. Last stage only."""
        return self._head(self._norm(residual_NH, self._final_norm.float()))

    def run_prompts(
        self,
        chunk: int,
        residual_NH: Tensor,
        rope: tuple[Tensor, Tensor],
        lengths: list[int],
        store: Callable[..., None],
    ) -> Tensor:
        """Packed prompts of these lengths through a chunk; `store(layer, key, value)` receives keys and values."""
        offsets = torch.tensor([0, *lengths], device=residual_NH.device).cumsum(0).to(torch.int32)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=offsets,
            cu_seqlens_kv=offsets,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
        )

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            store(layer, key, value)
            return self._prompt_attention(query.flatten(1, 2), key, value, None, packed_seq_params=packed)

        return self._run_layers(chunk, residual_NH, rope, attend)

    def run_next(
        self, chunk: int, residual_NH: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache
    ) -> Tensor:
        """One new token a sequence through a chunk; its keys and values enter the cache.

        After the last chunk the caller lets the cache advance.
        """

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return cache.attend(layer, query, key, value, self._softmax_scale).flatten(1)

        return self._run_layers(chunk, residual_NH, rope, attend)

    def rope(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [positions, 1, 1, D] of the rotary embedding in the compute dtype.

        The sines of the first half are negated: rotate_half(x) · sin = roll(x, D/2) · these.
        """
        inverse = self._model.rotary_pos_emb.inv_freq.to(self.device)
        angles = torch.outer(torch.arange(positions, dtype=inverse.dtype, device=self.device), inverse)
        cos, sin = angles.cos(), angles.sin()
        pair = torch.cat((cos, cos), -1).to(self.dtype), torch.cat((-sin, sin), -1).to(self.dtype)
        return pair[0][:, None, None], pair[1][:, None, None]

    def _run_layers(
        self, chunk: int, residual_NH: Tensor, rope: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        shape = (len(residual_NH), self.groups, self.heads_per_group + 2, self.head_dim)
        heads = self.heads_per_group
        count = len(self.layers) // self.chunks
        for index in range(chunk * count, (chunk + 1) * count):
            layer = self.layers[index]
            normed_NH = self._norm(residual_NH, layer.attention_norm)
            qkv = layer.qkv(normed_NH).view(shape)
            rotated = self._rotate(self._norm_heads(qkv, layer), rope)
            attended = attend(index, rotated[:, :, :heads], rotated[:, :, heads], qkv[:, :, heads + 1])
            residual_NH = residual_NH + self._sum(layer.attention_out(attended))
            normed_NH = self._norm(residual_NH, layer.mlp_norm)
            residual_NH = residual_NH + self._sum(layer.feed_forward(normed_NH))
        return residual_NH

    def _norm_heads(self, qkv: Tensor, layer: _Layer) -> Tensor:
        """Queries and keys [N, G, R + 1, D], normalised per head where the family does (Qwen3)."""
        heads = self.heads_per_group
        if layer.query_norm is None or layer.key_norm is None:
            return qkv[:, :, : heads + 1]
        query = F.rms_norm(qkv[:, :, :heads], (self.head_dim,), layer.query_norm, self._eps)
        key = F.rms_norm(qkv[:, :, heads : heads + 1], (self.head_dim,), layer.key_norm, self._eps)
        return torch.cat((query, key), 2)

    def _rotate(self, heads: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return (heads * rope[0]).add_(heads.roll(self.head_dim // 2, -1).mul_(rope[1]))

    def _norm(self, residual_NH: Tensor, weight_H: Tensor) -> Tensor:
        return F.rms_norm(residual_NH, weight_H.shape, weight_H, self._eps).to(self.dtype)

    def _sum(self, partial: Tensor) -> Tensor:
        if self._tp.size() > 1:
            dist.all_reduce(partial, group=self._tp)
        return partial


def _read_layer(layer: Any, groups: ProcessGroupCollection, rows: int) -> _Layer:
    attention = layer.self_attention
    norms = (attention.q_layernorm, attention.k_layernorm)  # without weights in families that have none
    query_norm, key_norm = (norm.weight.detach() if hasattr(norm, "weight") else None for norm in norms)
    return _Layer(
        attention_norm=layer.input_layernorm.weight.detach().float(),
        qkv=project(attention.linear_qkv.weight, attention.linear_qkv.bias, rows=rows),
        query_norm=query_norm,
        key_norm=key_norm,
        attention_out=project(attention.linear_proj.weight, rows=rows),
        mlp_norm=layer.pre_mlp_layernorm.weight.detach().float(),
        feed_forward=read_feed_forward(layer.mlp, groups, rows=rows),
    )
