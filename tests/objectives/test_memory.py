"""Live bytes of the divergences, forward and backward, as torch's profiler sees the allocator: every temporary counts.

Extra memory is the peak without the inputs, which are there before, and without the returned gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_opd.kernels import torch_streaming
from megatron_opd.objectives import LinearLogits, TokenStats, topk_divergence, vocab_parallel_divergence
from megatron_opd.objectives import logits as logits_module
from tests.objectives.cases import KINDS
from tests.objectives.covering import covering
from tests.objectives.linear_cases import LinearCase, random_linear_case

CHUNK, WIDTH, HIDDEN = 16, 4000, 16
BLOCK = 4 * WIDTH  # elements of the kernels' blocks in these tests: 4 tokens
SCRATCH = 5 * BLOCK * 4  # bytes of their three float32 buffers and of two single operations on a block
ROWS = 1000  # of the weight's gradient that are computed at once
PER_TOKEN = 400  # bytes: the statistics, what is saved and what both passes hold besides, a few dozen numbers


@dataclass
class Bytes:
    peak: int  # above what was there before, without the returned gradients
    largest: int  # single allocation
    left: int  # still there with the graph and all results gone


def measured(function: Callable[[], TokenStats], inputs: Sequence[Tensor]) -> Bytes:
    """One forward and backward pass of function(), differentiated with respect to the inputs."""
    returned = 0

    def step() -> None:
        nonlocal returned
        stats = function()
        total = stats.divergence.sum()
        if stats.student_logprob is not None:
            total = total + stats.student_logprob.sum()
        returned = sum(grad.nbytes for grad in torch.autograd.grad(total, inputs))

    peak, largest, left = allocated(step)
    return Bytes(peak - returned, largest, left)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_streaming, "CPU_BLOCK_ELEMENTS", BLOCK)
    monkeypatch.setattr(logits_module, "CPU_WEIGHT_GRADIENT_ELEMENTS", ROWS * HIDDEN)


def allocated(function: Callable[[], object]) -> tuple[int, int, int]:
    """Peak, largest single allocation and what is left, in bytes, of a call."""
    function()  # what torch allocates once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "a profiler that sees the allocator"
    live = peak = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak, largest = max(peak, live), max(largest, event.nbytes())
    return peak, largest, live


def product_scratch(dtype: torch.dtype) -> int:
    """What the matrix products of a chunk allocate besides their results: the library packs bf16 on some CPUs."""
    hidden = torch.ones(CHUNK, HIDDEN, dtype=dtype)
    weight = torch.ones(WIDTH, HIDDEN, dtype=dtype)
    grad = torch.ones(CHUNK, WIDTH, dtype=dtype)
    scratch = 0
    for a, b in ((hidden, weight.T), (grad, weight), (grad[:, :ROWS].T, hidden)):
        peak, _, _ = allocated(partial(torch.mm, a, b))
        scratch = max(scratch, peak - a.shape[0] * b.shape[1] * dtype.itemsize)
    return scratch


def linear(case: LinearCase, buffer: bool) -> Bytes:
    hidden, weight = case.student_hidden.requires_grad_(), case.student_weight.requires_grad_()
    weight_grad = torch.zeros(weight.shape) if buffer else None
    return measured(
        lambda: case.run(hidden, weight, case.teacher_weight, weight_grad=weight_grad), (hidden, weight)
    )


def case_of(count: int, dtype: torch.dtype, **options: Any) -> LinearCase:
    return random_linear_case(count, WIDTH, HIDDEN, HIDDEN, dtype=dtype, chunk_size=CHUNK, **options)


def test_the_measure_sees_what_a_plain_head_needs() -> None:
    case = case_of(64, torch.float32)
    hidden, weight = case.student_hidden.requires_grad_(), case.student_weight.requires_grad_()

    def plain() -> TokenStats:
        student = (hidden @ weight.T).log_softmax(1)
        teacher = (case.teacher_hidden @ case.teacher_weight.T).log_softmax(1)
        return TokenStats((student.exp() * (student - teacher)).sum(1))

    seen = measured(plain, (hidden, weight))
    assert seen.largest == 64 * WIDTH * 4 and 4 * seen.largest < seen.peak < 10 * seen.largest
    assert seen.left == 0


@pytest.mark.parametrize(
    "setting",
    covering(
        divergence=[KINDS[0], KINDS[1], KINDS[3]], dtype=[torch.float32, torch.bfloat16], buffer=[False, True]
    ),
)
def test_hidden_states_need_two_chunks_of_logits(setting: dict[str, Any]) -> None:
    """The bound of linear_divergence's docstring, for one chunk and for 16."""
    dtype, buffer = setting["dtype"], setting["buffer"]
    chunk = CHUNK * WIDTH * dtype.itemsize
    weight = WIDTH * HIDDEN * (4 if dtype == torch.bfloat16 and not buffer else 0)
    # Small things: a chunk's hidden states and their gradient, a block of rows of the weight's gradient.
    small = 3 * CHUNK * HIDDEN * 4 + 2 * ROWS * HIDDEN * 4
    library = product_scratch(dtype)
    for count in (CHUNK, 16 * CHUNK):
        seen = linear(case_of(count, dtype, **setting["divergence"]), buffer)
        assert seen.peak <= 2 * chunk + SCRATCH + weight + small + library + PER_TOKEN * count, count
        assert seen.left == 0
    assert seen.largest < count * WIDTH * dtype.itemsize / 2, "no tensor of the size of the logits"


def test_memory_of_hidden_states_does_not_grow_with_their_number() -> None:
    few, many = (linear(case_of(count, torch.float32), buffer=True) for count in (CHUNK, 25 * CHUNK))
    assert many.peak - few.peak <= 24 * CHUNK * PER_TOKEN < 24 * CHUNK * WIDTH * 4 / 32
    assert many.largest == few.largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", [KINDS[0], KINDS[1], KINDS[3]], ids=str)
def test_logits_need_their_gradient_only(divergence: dict[str, Any], dtype: torch.dtype) -> None:
    """Extra memory is the kernels' blocks, whatever N is: the gradient itself is what is returned."""
    targets = torch.arange(256)
    leaf, teacher = torch.randn(2, 256, WIDTH).to(dtype)
    leaf.requires_grad_()
    seen = measured(lambda: vocab_parallel_divergence(leaf, teacher, targets=targets, **divergence), (leaf,))
    assert seen.peak <= SCRATCH + 256 * PER_TOKEN < leaf.nbytes / 2 and seen.left == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_in_place_allocates_no_logits(dtype: torch.dtype) -> None:
    leaf, teacher = torch.randn(2, 256, WIDTH).to(dtype)
    student, targets = leaf.requires_grad_() * 1, torch.arange(256)
    for inplace in (False, True):
        options: dict[str, Any] = {"targets": targets, "inplace_backward": inplace}
        seen = measured(lambda: vocab_parallel_divergence(student, teacher, **options), (student,))  # noqa: B023
        assert (seen.largest < student.nbytes / 8) == inplace


@pytest.mark.parametrize("support", ["teacher_topk", "student_topk_sampled"])
@pytest.mark.parametrize("computed", [False, True], ids=["logits", "hidden states"])
def test_a_support_needs_numbers_of_its_own_size(support: str, computed: bool) -> None:
    k, count = 7, 256
    case = case_of(count, torch.float32, support=support, k=k)
    if computed:
        seen = linear(case, buffer=True)
        logits = 2 * CHUNK * WIDTH * 4
    else:
        leaf = (case.student_hidden @ case.student_weight.T).requires_grad_()
        teacher = case.teacher_hidden @ case.teacher_weight.T
        options: dict[str, Any] = {
            name: value for name, value in case.options.items() if name != "chunk_size"
        }
        seen = measured(lambda: topk_divergence(leaf, teacher, targets=case.targets, **options), (leaf,))
        logits = 0
    # Of the top-K of a chunk, and where ids are compared with each other, [chunk, K, K].
    block = (CHUNK if computed else count) * (k + 1) * (k + 2) * 16
    support_bytes = count * (k + 1) * 250
    assert seen.peak <= logits + SCRATCH + block + support_bytes + count * PER_TOKEN
    assert seen.left == 0


def test_a_server_and_hidden_states() -> None:
    case = case_of(256, torch.float32)
    hidden, weight = case.student_hidden.requires_grad_(), case.student_weight.requires_grad_()
    served = torch.arange(5).expand(256, -1), torch.full((256, 5), -3.0)
    student = LinearLogits(hidden, weight, torch.zeros(weight.shape))
    seen = measured(lambda: topk_divergence(student, served, chunk_size=CHUNK), (hidden, weight))
    assert seen.largest < 256 * WIDTH * 4 / 8


def test_a_wide_support_costs_memory_in_proportion() -> None:
    """64 tokens with K = 1,024: [N, K] numbers are half a megabyte each, [N, K, K] would be 512."""
    student = torch.randn(64, 2048, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(64, 2048, dtype=torch.float64)
    targets = torch.randint(2048, (64,))

    def stats() -> TokenStats:
        return topk_divergence(student, teacher, k=1024, targets=targets, support="teacher_topk_sampled")

    assert measured(stats, [student]).largest < 8 * 2**20
