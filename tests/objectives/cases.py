"""Logits for the divergence tests, and a run of one rank's shard that reports all a test may ask about.

Shape suffixes as in the package: N tokens, V vocabulary, K ids of a support.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.objectives import TokenStats, reference, topk_divergence, vocab_parallel_divergence
from tools.bench.traffic import Call, recorded_traffic

FIELDS = (
    "divergence",
    "student_logprob",
    "teacher_logprob",
    "student_entropy",
    "teacher_entropy",
    "reverse_kl",
)
MASSES = ("student_mass", "teacher_mass")
KINDS = (
    {"kind": "reverse_kl"},
    {"kind": "forward_kl"},
    {"kind": "jsd", "beta": 0.1},
    {"kind": "jsd", "beta": 0.5},
    {"kind": "jsd", "beta": 0.9},
)


@dataclass
class Case:
    """Whole logits [N, V] with targets and incoming gradients of divergence and student log-probability."""

    student: Tensor
    teacher: Tensor
    targets: Tensor
    divergence_grad: Tensor
    logprob_grad: Tensor
    options: dict[str, Any] = field(default_factory=dict)  # of topk_divergence where "support" is among them
    served: Tensor | None = None  # [N, K] the teacher's best ids, -1 where fewer, in place of its logits

    @property
    def topk(self) -> bool:
        return "support" in self.options or self.served is not None

    @property
    def vocab_size(self) -> int:
        return self.options.get("vocab_size", self.student.shape[1])

    def reference(self, student: Tensor) -> TokenStats:
        """The reference's statistics of whole student logits, float64."""
        if self.served is not None and len(self.served) > 0:
            return self._reference_by_row(student, self.served)
        function = reference.topk_divergence if self.topk else reference.vocab_parallel_divergence
        options = known(function, self.options | ({} if self.served is None else {"k": self.served.shape[1]}))
        return function(student, self.teacher, targets=self.targets, **options)

    def _reference_by_row(self, student: Tensor, served: Tensor) -> TokenStats:
        """The reference has one K for all tokens; a server may name fewer ids for some."""
        rows = []
        for row, ids in enumerate(served):
            options = known(reference.topk_divergence, self.options) | {"k": int((ids >= 0).sum())}
            if "rollout_logprob" in options:
                options["rollout_logprob"] = options["rollout_logprob"][row : row + 1]
            here = slice(row, row + 1)
            rows.append(
                reference.topk_divergence(
                    student[here], self.teacher[here], targets=self.targets[here], **options
                )
            )
        return TokenStats(*(torch.cat([getattr(row, name) for row in rows]) for name in (*FIELDS, *MASSES)))

    def truth(self) -> tuple[TokenStats, Tensor]:
        """The reference's statistics and gradient of the whole student logits, float64."""
        student = self.student.detach().double().requires_grad_()
        stats = self.reference(student)
        assert stats.student_logprob is not None
        total = (stats.divergence * self.divergence_grad + stats.student_logprob * self.logprob_grad).sum()
        (gradient,) = torch.autograd.grad(total, student)
        return stats, gradient

    def run(
        self, student: Tensor, teacher: Tensor, group: dist.ProcessGroup | None = None, **more: Any
    ) -> TokenStats:
        """The function under test on these shards of the logits, with the case's targets and options."""
        options = {"targets": self.targets, "group": group} | self.options | more
        if self.served is None:
            function = topk_divergence if self.topk else vocab_parallel_divergence
            return function(student, teacher, **options)
        whole_NV = self.teacher[:, : self.vocab_size].double() / self.options.get("temperature", 1.0)
        whole_NV = whole_NV.log_softmax(1)
        logprobs_NK = whole_NV.gather(1, self.served.clamp(min=0)).masked_fill(self.served < 0, torch.nan)
        options["teacher_logprob"] = whole_NV.gather(1, self.targets[:, None])[:, 0]
        return topk_divergence(student, (self.served, logprobs_NK), **options)


def known(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that the function has: the reference knows nothing of shards and memory."""
    return {name: value for name, value in options.items() if name in inspect.signature(function).parameters}


def random_case(
    count: int = 13,
    width: int = 96,
    dtype: torch.dtype = torch.float64,
    largest_scale: float = 20.0,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Rows of very different scale and offset; targets within the real vocabulary."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    exponents = torch.linspace(-1, math.log10(largest_scale), max(count, 1), dtype=torch.float64)
    scale, offset = 10.0 ** exponents[:count, None], 30.0 * draw(count, 1)
    student = (scale * draw(count, width) + offset).to(dtype)
    teacher = (scale * draw(count, width) - offset).to(dtype)
    targets = torch.randint(options.get("vocab_size", width), (count,), generator=generator)
    return Case(student, teacher, targets, draw(count), draw(count), options)


@dataclass
class Outcome:
    """What one rank saw."""

    stats: dict[str, Tensor | None]
    gradient: Tensor
    forward: list[tuple[str, int]]  # collectives: kind and how many numbers this rank gave
    backward: list[tuple[str, int]]
    # numel of each tensor kept for backward, and whether it is one of the inputs
    saved: list[tuple[int, bool]]


def run_shard(case: Case) -> Outcome:
    """Runs the function on this rank's columns of the case over the WORLD group."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    # One rank may have a teacher of another padded width.
    shards = [logits.chunk(ranks, dim=1)[rank].clone() for logits in (case.student, case.teacher)]
    student = shards[0].requires_grad_()
    with recorded_traffic() as forward, saved_tensors(*shards) as saved:
        stats = case.run(student, shards[1], dist.group.WORLD, entropies=True)
    assert stats.student_logprob is not None and stats.student_logprob.grad_fn is not None
    kept = vars(stats.student_logprob.grad_fn).values()  # past the hooks that count what is saved
    assert not any(isinstance(value, Tensor) for value in kept)
    dtype = stats.divergence.dtype
    with recorded_traffic() as backward:
        torch.autograd.backward(
            [stats.divergence, stats.student_logprob],
            [case.divergence_grad.to(dtype), case.logprob_grad.to(dtype)],
        )
    assert student.grad is not None
    return Outcome(detached(stats), student.grad, given(forward), given(backward), saved)


def detached(stats: TokenStats) -> dict[str, Tensor | None]:
    """The statistics as numbers that can be sent from a worker."""
    return {name: None if value is None else value.detach() for name, value in vars(stats).items()}


def assert_stats(ours: dict[str, Tensor | None], truth: TokenStats, tolerance: float) -> None:
    """Every statistic that there is equals the reference's, relative to its own size."""
    present = {name: value.double() for name, value in ours.items() if value is not None}
    expected = {name: getattr(truth, name).detach() for name in present}
    torch.testing.assert_close(present, expected, rtol=tolerance, atol=tolerance)


def assert_matches(case: Case, outcomes: list[Outcome], tolerance: float) -> None:
    """Statistics on every rank and the gradient of every shard, relative to their own size."""
    stats, gradient = case.truth()
    absent = set() if case.topk else set(MASSES)
    if case.served is not None:
        absent |= {"teacher_entropy", "reverse_kl"}
    for outcome in outcomes:
        assert {name for name, value in outcome.stats.items() if value is None} == absent
        assert_stats(outcome.stats, stats, tolerance)
    shards = torch.cat([outcome.gradient for outcome in outcomes], dim=1)
    torch.testing.assert_close(shards.double(), gradient, rtol=tolerance, atol=tolerance)
    assert (shards[:, case.vocab_size :] == 0).all()


def given(calls: list[Call]) -> list[tuple[str, int]]:
    """Kind and numel of what this rank gave, of each call."""
    return [(call.kind, call.numel) for call in calls]


@contextlib.contextmanager
def saved_tensors(*inputs: Tensor) -> Iterator[list[tuple[int, bool]]]:
    """numel of each tensor that autograd keeps, and whether it lies in the storage of one of the inputs."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    saved: list[tuple[int, bool]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append((tensor.numel(), tensor.untyped_storage().data_ptr() in storages))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
