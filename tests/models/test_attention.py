"""Attention of packed sequences against a plain formula in float64, whole and shared by context-parallel ranks."""

from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_opd.models import attention
from megatron_opd.models.attention import PackedAttention, core_attention
from megatron_opd.objectives import zigzag_positions
from megatron_opd.parallel import cpu
from tests.objectives.cases import given
from tools.bench.traffic import recorded_traffic

HEADS, GROUPS, SIZE = 6, 2, 8
SCALE = 0.3


def _packed(lengths: list[int]) -> PackedSeqParams:
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def _inputs(lengths: list[int]) -> tuple[list[Tensor], Tensor]:
    """Query, key, value of the whole microbatch and the gradient of the output, float32."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(sum(lengths), heads, SIZE, generator=generator) for heads in (HEADS, GROUPS, GROUPS)
    ]
    return inputs, torch.randn(sum(lengths), HEADS * SIZE, generator=generator)


def _plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[L, A, D], [L, G, D]: softmax over earlier positions."""
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    key, value = (x.repeat_interleave(query.size(0) // x.size(0), 0) for x in (key, value))
    scores = query @ key.transpose(1, 2) * SCALE
    scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)


def _expected(lengths: list[int]) -> list[Tensor]:
    """Output and the gradients of query, key and value, float64."""
    inputs, upstream = _inputs(lengths)
    doubles = [x.double().requires_grad_() for x in inputs]
    parts = zip(*(x.split(lengths) for x in doubles), strict=True)
    out = torch.cat([_plain(*part) for part in parts])
    return [out.detach(), *torch.autograd.grad((out * upstream.double()).sum(), doubles)]


def _shard(lengths: list[int], dtype: torch.dtype) -> tuple[list[Tensor], list[Any], list[int]]:
    """Output and gradients of this rank's share, the collectives, the numbers kept for the backward pass."""
    cpu.install()
    packed = _packed(lengths)
    mine = zigzag_positions(packed.cu_seqlens_q, dist.get_rank(), dist.get_world_size())
    inputs, upstream = _inputs(lengths)
    shares = [x[mine].to(dtype).requires_grad_() for x in inputs]
    module = PackedAttention(None, SCALE, ProcessGroupCollection(cp=dist.group.WORLD))
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            saved.append(tensor.numel())
        return tensor

    with recorded_traffic() as calls:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = module(*shares, None, packed_seq_params=packed)
        gradients = torch.autograd.grad((out * upstream[mine]).sum(), shares)
    assert out.dtype is dtype
    return [out.detach(), *gradients], given(calls), saved


@pytest.mark.parametrize(
    ("ranks", "lengths"),
    [
        *((1, lengths) for lengths in ([7], [5, 1, 9], [1, 1], [4, 4])),
        *((2, lengths) for lengths in ([4], [4, 24, 8], [16, 16])),
        *((4, lengths) for lengths in ([8], [40, 8, 16, 8])),
    ],
)
def test_segments_stay_apart_in_value_and_gradient(gloo, ranks, lengths):
    expected = _expected(lengths)
    offsets = _packed(lengths).cu_seqlens_q
    for rank, (results, calls, _) in enumerate(gloo(ranks, _shard, lengths, torch.float32)):
        mine = zigzag_positions(offsets, rank, ranks)
        for got, want in zip(results, expected, strict=True):
            torch.testing.assert_close(got.double(), want[mine], atol=1e-5, rtol=1e-5)
        share = sum(lengths) // ranks * GROUPS * 2 * SIZE
        both_ways = [("all_gather", share), ("reduce_scatter", share * ranks)]
        assert calls == (both_ways if ranks > 1 else [])


def test_what_is_kept_for_the_backward_pass(gloo):
    """Rank 0 holds a segment's first chunk, which needs no mask, and its last, which sees all keys."""
    tokens, ranks = 64, 4
    chunk = tokens // (2 * ranks)
    piece = chunk * HEADS * (2 * SIZE + 1)  # query, output, normalisers
    keys = 2 * GROUPS * SIZE
    expected = [2 * piece + keys * chunk + keys * tokens + chunk * tokens]
    for rank in range(1, ranks):
        seen = (rank + 1) * chunk, (2 * ranks - rank) * chunk
        expected.append(2 * piece + sum(seen) * (keys + chunk))
    kept = [sum(saved) for _, _, saved in gloo(ranks, _shard, [tokens], torch.float32)]
    assert kept == expected


def test_bf16_is_computed_in_float32(gloo):
    expected = _expected([24, 8])
    offsets = _packed([24, 8]).cu_seqlens_q
    for rank, (results, _, _) in enumerate(gloo(2, _shard, [24, 8], torch.bfloat16)):
        for got, want in zip(results, expected, strict=True):
            assert (got.double() - want[zigzag_positions(offsets, rank, 2)]).abs().max() < 3e-2


def test_transformer_engine_is_for_bf16_on_a_gpu_that_has_it(monkeypatch):
    assert core_attention(torch.bfloat16) is PackedAttention
    monkeypatch.setattr(attention, "find_spec", lambda name: name)
    assert core_attention(torch.bfloat16) is PackedAttention, "installed, but there is no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert core_attention(torch.float32) is PackedAttention
    assert core_attention(torch.bfloat16) is TEDotProductAttention
