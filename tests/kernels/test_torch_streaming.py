"""The streaming passes in plain torch: blocks of any size, and temporaries that stay small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_opd.kernels import torch_streaming
from tests.kernels import formulas

COUNT, WIDTH = 37, 50
KINDS = ("reverse_kl", "jsd", "forward_kl", "logprob")


def everything(student: Tensor, teacher: Tensor, out: Tensor) -> list[Tensor]:
    """All that the passes compute, from `formulas.random_rows`; out is overwritten."""
    rows = formulas.random_rows(len(student), student)
    assert rows.teacher_max is not None and rows.log_sum_ratio is not None
    results = [
        torch_streaming.statistics(student, teacher, temperature=0.5, forward_cross=True, entropies=True),
        torch_streaming.jsd_statistics(
            student,
            teacher,
            student_max_N=rows.student_max,
            teacher_max_N=rows.teacher_max,
            log_sum_ratio_N=rows.log_sum_ratio,
            beta=0.3,
            temperature=0.5,
        ),
    ]
    for kind in KINDS:
        torch_streaming.gradient(
            student, teacher, kind=kind, rows=rows, temperature=0.5, beta=0.3, out_NV=out
        )
        results.append(out.sum(-1))
    return results


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = 4 * torch.randn(2, COUNT, WIDTH, dtype=torch.float64)
    results = []
    # 37 tokens: in blocks of 1, of 8 with a short last one, in one block, and in one with room to spare.
    for elements in (1, 8 * WIDTH, COUNT * WIDTH, 2**20):
        monkeypatch.setattr(torch_streaming, "CPU_BLOCK_ELEMENTS", elements)
        results.append(everything(student, teacher, torch.empty_like(student)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-14, atol=1e-14)


class LargestTemporary(TorchDispatchMode):
    """The most bytes in one storage that an operation made, the given tensors apart."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temporaries_are_bounded(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    count, width, block = 400, 100, 1000
    monkeypatch.setattr(torch_streaming, "CPU_BLOCK_ELEMENTS", block)
    student, teacher, out = torch.randn(3, count, width).to(dtype)
    with LargestTemporary(student, teacher, out) as seen:
        everything(student, teacher, out)
    packed = 8 * count * 4  # the statistics
    assert 0 < seen.bytes <= max(3 * block * 4, packed) < count * width * 2
