"""The linear layers of decoding: few rows at a time, no gradient.

A decoding step multiplies every weight by a handful of rows, so it takes as long as reading the weights takes. On a CPU
torch's general matrix product is several times slower than that; oneDNN reaches it with the weight in its own blocked
order. Reordering costs about one decoding step and one copy of the weight while it is held.

Shapes: N rows, I inputs, O outputs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Projection = Callable[[Tensor], Tensor]  # [N, I] -> [N, O]


def project(weight_OI: Tensor, bias_O: Tensor | None = None, *, rows: int) -> Projection:
    """x -> x · weightᵀ + bias with the weight's present values; `rows` is how many rows x will mostly have.

    On a CPU the values may be copied: make it anew after the weights have changed.
    """
    weight_OI = weight_OI.detach()
    bias_O = None if bias_O is None else bias_O.detach()
    if not _onednn_serves(weight_OI):
        return lambda x_NI: F.linear(x_NI, weight_OI, bias_O)
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight_OI, rows)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x_NI: multiply(x_NI, reordered, bias_O, "none", [], "")


def _onednn_serves(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32
