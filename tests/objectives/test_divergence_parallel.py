"""vocab_parallel_divergence on 1, 2 and 4 ranks against the float64 reference: values, gradients, traffic."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings

from megatron_opd.objectives import vocab_parallel_divergence
from tests.gloo_pool import GlooPools
from tests.objectives.cases import FIELDS, KINDS, Case, assert_matches, random_case, run_shard
from tests.objectives.covering import covering

WORLDS = [1, 2, 4]


@pytest.mark.parametrize(
    "setting",
    covering(
        divergence=KINDS,
        world_size=WORLDS,
        vocab_size=[96, 83, 60],  # none, some and more than a shard of padding on 4 ranks
        temperature=[1.0, 0.7],
        teacher_width=[96, 84],  # another padding, where one rank can tell
        allowed=lambda s: s["teacher_width"] == 96 or (s["world_size"] == 1 and s["vocab_size"] <= 83),
    ),
)
def test_float64_exact(gloo: GlooPools, setting: dict[str, Any]) -> None:
    vocab_size = setting["vocab_size"]
    case = random_case(vocab_size=vocab_size, temperature=setting["temperature"], **setting["divergence"])
    case.student[:, vocab_size:] = 1e3  # what padding rows of a head give is arbitrary
    case.teacher[:, vocab_size:] = torch.nan
    case.teacher = case.teacher[:, : setting["teacher_width"]]
    assert_matches(case, gloo(setting["world_size"], run_shard, case), 1e-10)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(0, 9),
    st.integers(1, 17),
    st.sampled_from(WORLDS),
    st.floats(0, 1),
    st.floats(0.2, 50),
    st.floats(0.3, 3),
    st.sampled_from(["reverse_kl", "forward_kl", "jsd"]),
    st.floats(0.01, 0.99),
)
def test_float64_exact_whatever_the_shapes(
    gloo: GlooPools,
    seed: int,
    count: int,
    shard: int,
    world_size: int,
    real: float,
    largest_scale: float,
    temperature: float,
    kind: str,
    beta: float,
) -> None:
    width = shard * world_size
    options: dict[str, Any] = {"kind": kind, "beta": beta, "temperature": temperature}
    options["vocab_size"] = max(1, round(real * width))
    case = random_case(count, width, largest_scale=largest_scale, seed=seed, **options)
    assert_matches(case, gloo(world_size, run_shard, case), 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_huge_logits(gloo: GlooPools, dtype: torch.dtype, tolerance: float) -> None:
    case = random_case(vocab_size=90)
    case.student = (torch.sign(case.student) * 1e4 + case.student).to(dtype)
    case.teacher = (torch.sign(case.teacher.flip(0)) * 1e4 + case.teacher).to(dtype)
    outcomes = gloo(4, run_shard, case)
    assert all(torch.isfinite(outcome.gradient).all() for outcome in outcomes)
    scale = case.truth()[0].divergence.max().item()
    assert scale > 1e3
    case.divergence_grad /= scale
    assert_matches(case, gloo(4, run_shard, case), tolerance)


def test_minus_inf_logits(gloo: GlooPools) -> None:
    case = random_case()
    case.targets.fill_(5)
    case.student[:, 10:20] = -torch.inf  # the student's own mask
    case.teacher[:, 15:20] = -torch.inf  # of which the teacher shares a part
    case.student[:7, 48:72] = -torch.inf  # a whole shard of 4, for some tokens
    case.teacher[:3, 48:72] = -torch.inf
    outcomes = gloo(4, run_shard, case)
    assert_matches(case, outcomes, 1e-12)
    assert (torch.cat([outcome.gradient for outcome in outcomes], dim=1)[:, 10:20] == 0).all()


def test_excluded_id_in_a_shard_without_student_mass(gloo: GlooPools) -> None:
    case = random_case()
    case.targets.fill_(5)
    case.student[:, 72:] -= 1e5  # probability 0 in float64
    case.teacher[:, 80] = -torch.inf
    whole = gloo(1, run_shard, case)[0]
    outcomes = gloo(4, run_shard, case)
    assert whole.stats["divergence"].isfinite().all()
    torch.testing.assert_close(outcomes[1].stats, whole.stats, rtol=1e-12, atol=1e-12)
    shards = torch.cat([outcome.gradient for outcome in outcomes], dim=1)
    torch.testing.assert_close(shards, whole.gradient, rtol=1e-12, atol=1e-12)


def test_low_precision(gloo: GlooPools) -> None:
    for dtype, value_tolerance, gradient_tolerance in (
        (torch.float32, 2e-5, 2e-5),
        (torch.bfloat16, 2e-5, 2**-7),
        (torch.float16, 2e-5, 2**-10),
    ):
        case = random_case(count=9, width=4096, dtype=dtype, vocab_size=4001)
        stats, gradient = case.truth()
        outcomes = gloo(2, run_shard, case)
        for name in FIELDS:
            value = outcomes[0].stats[name]
            assert value is not None and value.dtype == torch.float32
            torch.testing.assert_close(
                value.double(), getattr(stats, name).detach(), rtol=value_tolerance, atol=value_tolerance
            )
        shards = torch.cat([outcome.gradient for outcome in outcomes], dim=1)
        assert shards.dtype == dtype
        torch.testing.assert_close(
            shards.double(), gradient, rtol=gradient_tolerance, atol=gradient_tolerance / 8
        )


def test_no_tokens(gloo: GlooPools) -> None:
    for outcome in gloo(4, run_shard, random_case(count=0, vocab_size=60)):
        assert outcome.gradient.shape == (0, 24)
        assert all(outcome.stats[name].shape == (0,) for name in FIELDS)


def too_wide(case: Case) -> str:
    with pytest.raises(ValueError, match="vocab_size must be between 1 and 192") as caught:
        vocab_parallel_divergence(case.student, case.teacher, vocab_size=193, group=dist.group.WORLD)
    return str(caught.value)


def test_vocab_size_beyond_the_shards(gloo: GlooPools) -> None:
    assert len(gloo(2, too_wide, random_case())) == 2
