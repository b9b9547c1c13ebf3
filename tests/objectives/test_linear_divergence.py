"""linear_divergence, and topk_divergence from hidden states, against the float64 reference: values and gradients.

Every gradient that the head has: hidden states, the weight's shard, the weight's buffer, the tied embedding's.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from megatron_opd.objectives import (
    LinearLogits,
    linear_divergence,
    topk_divergence,
    vocab_parallel_divergence,
)
from megatron_opd.objectives import logits as logits_module
from tests.gloo_pool import GlooPools
from tests.objectives.cases import FIELDS, KINDS, assert_stats, detached
from tests.objectives.covering import covering
from tests.objectives.linear_cases import LinearCase, LinearOutcome, random_linear_case, run_linear_shard

WORLDS = [1, 2, 4]
CHUNKS = [1, 5, 100]  # one token, a short last chunk, more than there are


def assert_linear_matches(case: LinearCase, outcomes: list[LinearOutcome], tolerance: float) -> None:
    """Statistics on every rank, the gradients of the hidden states and of every head shard."""
    stats, hidden_grad, weight_grad = case.truth()
    for outcome in outcomes:
        assert all(getattr(outcome.stats, name) is not None for name in FIELDS)
        assert_stats(detached(outcome.stats), stats, tolerance)
    sequence_parallel = case.options.get("sequence_parallel", False)
    hidden = [outcome.hidden_grad.double() for outcome in outcomes]
    for ours in [torch.cat(hidden)] if sequence_parallel else hidden:
        torch.testing.assert_close(ours, hidden_grad, rtol=tolerance, atol=tolerance)
    weights = [
        outcome.weight_grad.double() + (0.0 if outcome.buffer is None else outcome.buffer)
        for outcome in outcomes
    ]
    torch.testing.assert_close(torch.cat(weights), weight_grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "setting",
    covering(
        divergence=KINDS,
        world_size=WORLDS,
        sequence_parallel=[False, True],
        chunk_size=CHUNKS,
        teacher_hidden=[10, 7],
        head=["tied", "buffer", "tied buffer"],
        vocabulary=[
            (48, 1.0),
            (41, 0.7),
            (30, 1.3),
        ],  # none, some and more than a shard of padding on 4 ranks
    ),
)
def test_float64_exact(gloo: GlooPools, setting: dict[str, Any]) -> None:
    setting = dict(setting)
    world_size, head = setting.pop("world_size"), setting.pop("head")
    vocab_size, temperature = setting.pop("vocabulary")
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "temperature": temperature,
        **setting.pop("divergence"),
        **setting,
    }
    case = random_linear_case(tied="tied" in head, entropies=True, **options)
    buffer = 3.0 if "buffer" in head else None
    outcomes = gloo(world_size, run_linear_shard, case, buffer)
    assert_linear_matches(case, outcomes, 1e-10)
    if head == "buffer":
        assert all((outcome.weight_grad == 0).all() for outcome in outcomes)


@pytest.mark.parametrize(
    "setting",
    covering(
        kind=["reverse_kl", "forward_kl"],
        support=["teacher_topk", "student_topk_sampled"],
        remainder=["renormalize", "mass_correction", "sampled_tail"],
        world_size=WORLDS,
        sequence_parallel=[False, True],
        chunk_size=[5, 100],
        head=["apart", "tied buffer"],
        k=[1, 20],
        allowed=lambda s: (
            s["remainder"] != "sampled_tail" or (s["kind"] == "reverse_kl" and s["support"] == "teacher_topk")
        ),
    ),
)
def test_topk_float64_exact(gloo: GlooPools, setting: dict[str, Any]) -> None:
    setting = dict(setting)
    world_size, head = setting.pop("world_size"), setting.pop("head")
    case = random_linear_case(
        tied="tied" in head, entropies=True, vocab_size=41, temperature=0.8, teacher_hidden=7, **setting
    )
    outcomes = gloo(world_size, run_linear_shard, case, -1.5 if "buffer" in head else None)
    assert_linear_matches(case, outcomes, 1e-10)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(0, 3),
    st.integers(1, 9),
    st.sampled_from(WORLDS),
    st.booleans(),
    st.integers(1, 14),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.floats(0, 1),
    st.sampled_from(["reverse_kl", "forward_kl", "jsd"]),
)
def test_float64_exact_whatever_the_shapes(
    gloo: GlooPools,
    seed: int,
    count: int,
    shard: int,
    world_size: int,
    sequence_parallel: bool,
    chunk_size: int,
    hidden: tuple[int, int],
    real: float,
    kind: str,
) -> None:
    count, width = count * world_size, shard * world_size
    options: dict[str, Any] = {
        "sequence_parallel": sequence_parallel,
        "chunk_size": chunk_size,
        "kind": kind,
        "entropies": True,
    }
    options["vocab_size"] = max(1, round(real * width))
    case = random_linear_case(count, width, *hidden, seed=seed, **options)
    assert_linear_matches(case, gloo(world_size, run_linear_shard, case), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_equals_the_function_of_whole_logits(divergence: dict[str, Any], dtype: torch.dtype) -> None:
    case = random_linear_case(dtype=dtype, vocab_size=41, temperature=1.3, chunk_size=12, **divergence)
    hidden = case.student_hidden.clone().requires_grad_()
    weight = case.student_weight.clone().requires_grad_()
    stats = case.run(hidden, weight, case.teacher_weight, entropies=True)
    ours = (detached(stats), *torch.autograd.grad(case.loss(stats), (hidden, weight)))
    theirs, *gradients = case.materialised(entropies=True)
    # The same products and the same passes over them: nothing differs but the last matrix products' order.
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(ours[0], detached(theirs), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours[1:], tuple(gradients), rtol=10 * tolerance, atol=10 * tolerance)


def test_topk_of_a_computed_student_and_a_given_teacher() -> None:
    case = random_linear_case(support="teacher_topk", k=5, vocab_size=41)
    hidden = case.student_hidden.clone().requires_grad_()
    weight = case.student_weight.clone().requires_grad_()
    teacher = case.teacher_hidden @ case.teacher_weight.T
    stats = topk_divergence(
        LinearLogits(hidden, weight), teacher, targets=case.targets, chunk_size=5, **case.options
    )
    truth, *gradients = case.truth()
    assert_stats(detached(stats), truth, 1e-10)
    ours = torch.autograd.grad(case.loss(stats), (hidden, weight))
    torch.testing.assert_close(ours, tuple(gradients), rtol=1e-10, atol=1e-10)


def test_log_probability_alone_reads_no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_linear_case(chunk_size=5)
    hidden = case.student_hidden.clone().requires_grad_()
    weight = case.student_weight.clone().requires_grad_()
    stats = case.run(hidden, weight, case.teacher_weight)
    assert stats.student_logprob is not None
    read = []
    original = logits_module.LogitsReader.read

    def reading(self: logits_module.LogitsReader, tokens: slice, left_out_CV: None) -> torch.Tensor:
        read.append(self.weight_VD)
        return original(self, tokens, left_out_CV)

    monkeypatch.setattr(logits_module.LogitsReader, "read", reading)
    ours = torch.autograd.grad((stats.student_logprob * case.logprob_grad).sum(), (hidden, weight))
    assert len(read) == 3 and all(head is not case.teacher_weight for head in read)
    case.divergence_grad.zero_()
    torch.testing.assert_close(ours, case.truth()[1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("buffer", [None, 0.0], ids=["returned", "buffer"])
def test_sums_over_chunks_are_kept_in_float32(buffer: float | None) -> None:
    """1,024 chunks that each say the same: a sum in bf16 stands still once it is 256 times what it adds."""
    case = random_linear_case(1, 16, 8, 8, dtype=torch.bfloat16)
    case.student_hidden = case.student_hidden.expand(1024, -1).contiguous()
    case.teacher_hidden = case.teacher_hidden.expand(1024, -1).contiguous()
    case.targets = case.targets.expand(1024)
    case.options["chunk_size"] = 1
    hidden = case.student_hidden.clone().requires_grad_()
    weight = case.student_weight.clone().requires_grad_()
    main_grad = None if buffer is None else torch.zeros(weight.shape)
    stats = case.run(hidden, weight, case.teacher_weight, weight_grad=main_grad)
    case.loss(stats).backward()
    ours = weight.grad if main_grad is None else main_grad
    assert ours is not None
    logits = (case.student_hidden[:1] @ case.student_weight.T).requires_grad_()
    teacher = case.teacher_hidden[:1] @ case.teacher_weight.T
    one = vocab_parallel_divergence(logits, teacher, targets=case.targets[:1])
    (logits_grad,) = torch.autograd.grad(case.loss(one), logits)
    exact = 1024 * logits_grad.double().T @ case.student_hidden[:1].double()
    # One rounding of each chunk's product, one of what autograd gets.
    torch.testing.assert_close(ours.double(), exact, rtol=2.0**-7, atol=0.0)


def test_hidden_states_of_another_dtype_than_the_head() -> None:
    case = random_linear_case(chunk_size=5, dtype=torch.float32)
    hidden = case.student_hidden.double().requires_grad_()
    weight = case.student_weight.clone().requires_grad_()
    stats = linear_divergence(hidden, weight, case.teacher_hidden, case.teacher_weight, targets=case.targets)
    truth, *gradients = case.truth()
    assert_stats(detached(stats), truth, 2e-5)
    ours = torch.autograd.grad(case.loss(stats), (hidden, weight))
    assert [grad.dtype for grad in ours] == [torch.float64, torch.float32]
    for grad, expected in zip(ours, gradients, strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_every_backward_pass_adds_to_the_buffer() -> None:
    case = random_linear_case(chunk_size=5)
    weight = case.student_weight.clone().requires_grad_()
    main_grad = torch.zeros_like(case.student_weight)
    stats = case.run(case.student_hidden.clone(), weight, case.teacher_weight, weight_grad=main_grad)
    loss = case.loss(stats)
    loss.backward(retain_graph=True)
    once = main_grad.clone()
    loss.backward()
    torch.testing.assert_close(main_grad, 2 * once)
    assert weight.grad is not None and (weight.grad == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "forward"}, "unknown divergence kind 'forward'; supported: reverse_kl"),
        ({"kind": "jsd", "beta": 1.0}, "beta must lie between 0 and 1"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"vocab_size": 49}, "vocab_size must be between 1 and 48"),
        ({"targets": torch.zeros(11, dtype=torch.int64)}, r"targets must have shape \(12,\)"),
        (
            {"student_weight": torch.zeros(48, 9)},
            r"student hidden states and head .* \(12, 10\) and \(48, 9\)",
        ),
        (
            {"teacher_hidden": torch.zeros(12, 9)},
            r"teacher hidden states and head .* \(12, 9\) and \(48, 10\)",
        ),
        ({"teacher_hidden": torch.zeros(11, 10)}, r"same ids, not \(12, 48\) and \(11, 48\)"),
        ({"teacher_weight": torch.zeros(47, 10)}, r"same ids, not \(12, 48\) and \(12, 47\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    case = random_linear_case(dtype=torch.float32)
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    arguments: dict[str, Any] = {name: getattr(case, name) for name in names}
    with pytest.raises(ValueError, match=message):
        linear_divergence(**(arguments | change))
