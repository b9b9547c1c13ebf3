"""The layer parts that stand in for transformer-engine, each against a plain formula."""

import types

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_opd.models.layers import PackedAttention, RMSNorm, add_residual

CONFIG = types.SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False)


def _packed(lengths: list[int]) -> PackedSeqParams:
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def _plain_attention(query, key, value):
    """[L, A, D], [L, G, D] in float64: softmax over earlier positions."""
    query, key, value = (x.double().transpose(0, 1) for x in (query, key, value))
    key, value = (x.repeat_interleave(query.size(0) // x.size(0), 0) for x in (key, value))
    scores = query @ key.transpose(1, 2) / query.size(-1) ** 0.5
    scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("lengths", [[7], [5, 1, 9], [1, 1], [4, 4]])
def test_packed_attention_keeps_segments_apart_in_value_and_gradient(lengths):
    torch.manual_seed(0)
    total = sum(lengths)
    inputs = [torch.randn(total, heads, 8, requires_grad=True) for heads in (6, 2, 2)]
    out = PackedAttention(CONFIG)(*inputs, None, packed_seq_params=_packed(lengths))
    upstream = torch.randn(total, 48)
    gradients = torch.autograd.grad((out * upstream).sum(), inputs)

    doubles = [x.detach().double().requires_grad_() for x in inputs]
    parts = zip(*(x.split(lengths) for x in doubles), strict=True)
    expected = torch.cat([_plain_attention(*part) for part in parts])
    expected_gradients = torch.autograd.grad((expected * upstream.double()).sum(), doubles)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    for got, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_rms_norm_goes_from_the_residual_dtype_to_the_weight_dtype():
    config = types.SimpleNamespace(params_dtype=torch.bfloat16, sequence_parallel=True)
    norm = RMSNorm(config, 16, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    hidden = torch.randn(3, 1, 16)
    expected = hidden / (hidden.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.float()
    out = norm(hidden)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out, expected.bfloat16(), atol=2e-2, rtol=1e-2)
    assert getattr(norm.weight, "sequence_parallel") is True  # noqa: B009


def test_residual_keeps_its_float32():
    residual, output = torch.randn(4), torch.randn(4).bfloat16()
    added = add_residual(True, False)((output, None), residual, 0.0)
    assert added.dtype is torch.float32
    torch.testing.assert_close(added, residual + output.float())
