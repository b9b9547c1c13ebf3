"""The streaming passes: their statistics, shards without columns, and temporaries that stay small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_opd.kernels import reverse_kl_gradient, reverse_kl_statistics, statistic_names, torch_streaming

COUNT, WIDTH = 37, 50


@pytest.fixture
def logits() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    student, teacher = 4 * torch.randn(2, COUNT, WIDTH, dtype=torch.float64)
    return student, teacher, torch.randint(-1, WIDTH, (COUNT,))


def gradient(student: Tensor, teacher: Tensor, targets: Tensor, out: Tensor) -> Tensor:
    rows = torch.arange(1.0, 7.0, dtype=torch.float64)[:, None] * torch.linspace(
        0.1, 1, len(student), dtype=torch.float64
    )
    if torch.float64 not in (student.dtype, teacher.dtype):
        rows = rows.float()
    reverse_kl_gradient(
        student,
        teacher,
        targets,
        student_max_N=rows[5],
        teacher_max_N=rows[4],
        mean_gap_N=rows[0],
        divergence_scale_N=rows[1],
        logprob_scale_N=rows[2],
        target_grad_N=rows[3],
        temperature=0.5,
        out_NV=out,
    )
    return out


def test_statistics_are_their_formulas(logits: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, targets = logits
    packed = reverse_kl_statistics(student, teacher, targets, temperature=0.5, entropies=True)
    rows = dict(zip(statistic_names(True, True), packed, strict=True))
    z_s, z_t = student / 0.5, teacher / 0.5
    a, b = z_s - z_s.amax(-1, keepdim=True), z_t - z_t.amax(-1, keepdim=True)
    missing = torch.full((COUNT,), -torch.inf, dtype=torch.float64)
    picked = [torch.where(targets >= 0, z[range(COUNT), targets], missing) for z in (z_s, z_t)]
    expected = {
        "student_max": z_s.amax(-1),
        "student_sum": a.exp().sum(-1),
        "teacher_max": z_t.amax(-1),
        "teacher_sum": b.exp().sum(-1),
        "cross": (a.exp() * (a - b)).sum(-1),
        "student_target": picked[0],
        "teacher_target": picked[1],
        "student_moment": (a.exp() * a).sum(-1),
        "teacher_moment": (b.exp() * b).sum(-1),
    }
    torch.testing.assert_close(rows, expected, rtol=1e-13, atol=1e-13)


def test_blocks_change_nothing(
    logits: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, targets = logits
    results = []
    for elements in (
        1,
        8 * WIDTH,
        COUNT * WIDTH,
        2**20,
    ):  # 37 tokens: blocks of 1, of 8 with a short last one, one
        monkeypatch.setattr(torch_streaming, "CPU_BLOCK_ELEMENTS", elements)
        packed = reverse_kl_statistics(student, teacher, targets, temperature=0.5, entropies=True)
        results.append((packed, gradient(student, teacher, targets, torch.empty_like(student))))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradient_over_its_own_input(logits: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
    student, teacher, targets = logits[0].to(dtype), logits[1].to(dtype), logits[2]
    aside = gradient(student, teacher, targets, torch.empty_like(student))
    assert torch.equal(gradient(student, teacher, targets, student), aside)


def test_shard_without_columns() -> None:
    empty = torch.empty(3, 0)
    packed = reverse_kl_statistics(empty, empty, torch.tensor([-1, -1, -1]), temperature=1.0, entropies=True)
    rows = dict(zip(statistic_names(True, True), packed, strict=True))
    assert all(
        (rows[f"{name}_max"] == torch.finfo(torch.float32).min).all() for name in ("student", "teacher")
    )
    assert (rows["student_target"] == -torch.inf).all()
    zero = ("student_sum", "teacher_sum", "cross", "student_moment", "teacher_moment")
    assert all((rows[name] == 0).all() for name in zero)
    assert gradient(empty, empty, torch.tensor([-1, -1, -1]), empty).shape == (3, 0)


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
    targets = torch.zeros(count, dtype=torch.int64)
    with LargestTemporary(student, teacher, out) as seen:
        reverse_kl_statistics(student, teacher, targets, temperature=0.5, entropies=True)
        gradient(student, teacher, targets, out)
    rows = 9 * count * 8  # the statistics, and the float64 rows that this test makes
    assert 0 < seen.bytes <= max(3 * block * 4, rows) < count * width * 2
