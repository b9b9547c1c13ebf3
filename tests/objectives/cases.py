"""Logits for the divergence tests, and a run of one rank's shard that reports all a test may ask about."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.objectives import TokenStats, reference, vocab_parallel_divergence

FIELDS = ("divergence", "student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy")
COLLECTIVES = [
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "gather",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
    "batch_isend_irecv",
]


@dataclass
class Case:
    """Whole logits [N, V] with targets and incoming gradients of divergence and student log-probability."""

    student: Tensor
    teacher: Tensor
    targets: Tensor
    divergence_grad: Tensor
    logprob_grad: Tensor
    options: dict[str, Any] = field(default_factory=dict)  # of vocab_parallel_divergence

    def truth(self) -> tuple[TokenStats, Tensor]:
        """The reference's statistics and gradient of the whole student logits, float64."""
        student = self.student.detach().double().requires_grad_()
        known = {key: self.options[key] for key in ("temperature", "vocab_size") if key in self.options}
        stats = reference.vocab_parallel_divergence(student, self.teacher, targets=self.targets, **known)
        assert stats.student_logprob is not None
        total = (stats.divergence * self.divergence_grad + stats.student_logprob * self.logprob_grad).sum()
        (gradient,) = torch.autograd.grad(total, student)
        return stats, gradient


def random_case(count: int = 13, width: int = 96, dtype: torch.dtype = torch.float64, **options: Any) -> Case:
    """Rows of very different scale and offset; targets within the real vocabulary."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale, offset = 10.0 ** torch.linspace(-1, 1.3, max(count, 1))[:count, None], 30.0 * draw(count, 1)
    student = (scale * draw(count, width) + offset).to(dtype)
    teacher = (scale * draw(count, width) - offset).to(dtype)
    targets = torch.randint(options.get("vocab_size", width), (count,), generator=generator)
    return Case(student, teacher, targets, draw(count), draw(count), options)


@dataclass
class Outcome:
    """What one rank saw."""

    stats: dict[str, Tensor | None]
    gradient: Tensor
    collectives: tuple[int, int]  # forward, backward
    saved: list[
        tuple[int, bool]
    ]  # numel and whether it is one of the two logits, of each tensor kept for backward


def run_shard(case: Case) -> Outcome:
    """Runs the function on this rank's columns of the case over the WORLD group."""
    width = case.student.shape[1] // dist.get_world_size()
    columns = slice(dist.get_rank() * width, (dist.get_rank() + 1) * width)
    student = case.student[:, columns].clone().requires_grad_()
    teacher = case.teacher[:, columns].clone()
    logits = {student.untyped_storage().data_ptr(), teacher.untyped_storage().data_ptr()}
    saved: list[tuple[int, bool]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append((tensor.numel(), tensor.untyped_storage().data_ptr() in logits))
        return tensor

    with (
        counted_collectives() as forward,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        stats = vocab_parallel_divergence(
            student, teacher, targets=case.targets, group=dist.group.WORLD, entropies=True, **case.options
        )
    assert stats.student_logprob is not None and stats.divergence.grad_fn is not None
    assert not any(isinstance(value, Tensor) for value in vars(stats.divergence.grad_fn).values())
    dtype = stats.divergence.dtype
    with counted_collectives() as backward:
        torch.autograd.backward(
            [stats.divergence, stats.student_logprob],
            [case.divergence_grad.to(dtype), case.logprob_grad.to(dtype)],
        )
    assert student.grad is not None
    values = {name: getattr(stats, name) for name in FIELDS}
    return Outcome(
        {name: None if value is None else value.detach() for name, value in values.items()},
        student.grad,
        (sum(forward.values()), sum(backward.values())),
        saved,
    )


@contextlib.contextmanager
def counted_collectives() -> Iterator[dict[str, int]]:
    """Calls of each communication function of torch.distributed."""
    counts = dict.fromkeys(COLLECTIVES, 0)
    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            original = getattr(dist, name)

            def counting(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
                counts[_name] += 1
                return _original(*args, **kwargs)

            stack.enter_context(mock.patch.object(dist, name, counting))
        yield counts
