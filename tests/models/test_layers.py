"""The norm and the residual of a layer, each against a plain formula."""

import types

import torch

from megatron_opd.models.layers import RMSNorm, add_residual


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
