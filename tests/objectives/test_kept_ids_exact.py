"""kept_ids_only against the float64 reference: divergences, supports and whole losses restricted to what sampling kept.

Value and gradient of every shard, from logits and from hidden states in chunks, under tensor and context parallelism.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_opd.objectives import (
    Gate,
    KeptIds,
    LinearLogits,
    Objective,
    PolicyGradient,
    Shaping,
    TokenWeight,
    logits,
    reference,
    zigzag_positions,
)
from tests.gloo_pool import GlooPools
from tests.objectives.cases import KINDS, assert_matches, random_case, run_shard
from tests.objectives.covering import covering
from tests.objectives.linear_cases import random_linear_case, run_linear_shard
from tests.objectives.test_linear_divergence import assert_linear_matches
from tests.objectives.test_objective import CU_SEQLENS, MASK, PADDED, VOCAB, grid, packed_inputs
from tests.objectives.topk_cases import allowed, topk_case

WORLDS = [1, 2, 4]


def kept_with(targets: Tensor, vocab: int, seed: int = 0, largest: int = 20) -> KeptIds:
    """For each token its target and other ids, sometimes none, sometimes most, in any order."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for target in targets.tolist():
        count = min(int(torch.randint(largest + 1, (), generator=generator)) ** 2 // largest, vocab - 1)
        others = torch.randperm(vocab, generator=generator)
        row = torch.cat([torch.tensor([target]), others[others != target][:count]])
        rows.append(row[torch.randperm(len(row), generator=generator)])
    return KeptIds.of(rows)


@pytest.mark.parametrize(
    "setting",
    covering(
        divergence=KINDS,
        world_size=WORLDS,
        vocab_size=[96, 83, 60],  # none, some and more than a shard of padding on 4 ranks
        temperature=[1.0, 0.7],
        rows_at_once=[1, 5, 100],
    ),
)
def test_logits(gloo: GlooPools, setting: dict[str, Any]) -> None:
    vocab_size = setting["vocab_size"]
    case = random_case(
        vocab_size=vocab_size, temperature=setting["temperature"], largest_scale=5.0, **setting["divergence"]
    )
    case.student[:, vocab_size:], case.teacher[:, vocab_size:] = 1e3, torch.nan
    case.options["kept"] = kept_with(case.targets, vocab_size)
    outcomes = gloo(setting["world_size"], run_in_slices, case, setting["rows_at_once"])
    assert_matches(case, outcomes, 1e-10)
    outside = torch.ones(case.student.shape, dtype=torch.bool)
    for row, ids in enumerate(case.options["kept"].lists()):
        outside[row, ids] = False
    assert (torch.cat([outcome.gradient for outcome in outcomes], 1)[outside] == 0).all()
    plain = random_case(vocab_size=vocab_size, **setting["divergence"])
    for ours, theirs in zip(outcomes, gloo(setting["world_size"], run_shard, plain), strict=True):
        assert ours.saved == theirs.saved, "masked logits are not kept for the backward pass"
        assert (ours.forward, ours.backward) == (theirs.forward, theirs.backward), "no further collectives"


def run_in_slices(case: Any, rows: int) -> Any:
    """`run_shard` with masked copies of so many tokens at once."""
    whole, logits.MASKED_ELEMENTS = logits.MASKED_ELEMENTS, rows * case.student.shape[1]
    try:
        return run_shard(case)
    finally:
        logits.MASKED_ELEMENTS = whole


@pytest.mark.parametrize(
    "setting",
    covering(
        source=["teacher_topk", "student_topk_sampled", "student_topk"],
        kind=["reverse_kl", "forward_kl"],
        remainder=["renormalize", "bucket", "none", "mass_correction", "sampled_tail"],
        world_size=WORLDS,
        k=[1, 6, 40],
        allowed=lambda s: allowed(s) and (s["remainder"] != "bucket" or s["k"] == 1),
    ),
)
def test_supports_are_chosen_among_the_kept(gloo: GlooPools, setting: dict[str, Any]) -> None:
    """k above and below the number of kept ids; a bucket needs something outside."""
    setting = dict(setting)
    world_size, source, k = setting.pop("world_size"), setting.pop("source"), setting.pop("k")
    case = topk_case(source, k, vocab_size=83, temperature=0.7, **setting)
    case.options["kept"] = kept_with(case.targets, 83)
    if setting["remainder"] == "bucket":
        others = [ids if len(ids) > 3 else [*range(80)] for ids in case.options["kept"].lists()]
        case.options["kept"] = KeptIds.of(
            [list({*ids, target}) for ids, target in zip(others, case.targets.tolist(), strict=True)]
        )
    assert_matches(case, gloo(world_size, run_shard, case), 1e-10)


@pytest.mark.parametrize(
    "setting",
    covering(
        divergence=KINDS,
        support=[{}, {"support": "teacher_topk", "k": 4}, {"support": "student_topk_sampled", "k": 9}],
        world_size=WORLDS,
        sequence_parallel=[False, True],
        chunk_size=[1, 5, 100],
        vocab_size=[48, 41, 30],
        allowed=lambda s: not s["support"] or s["divergence"]["kind"] != "jsd",
    ),
)
def test_hidden_states_in_chunks(gloo: GlooPools, setting: dict[str, Any]) -> None:
    setting = dict(setting)
    world_size = setting.pop("world_size")
    options = {**setting.pop("divergence"), **setting.pop("support"), **setting}
    case = random_linear_case(entropies=True, temperature=0.8, teacher_hidden=7, **options)
    case.options["kept"] = kept_with(case.targets, setting["vocab_size"])
    assert_linear_matches(case, gloo(world_size, run_linear_shard, case), 1e-10)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 9),
    st.integers(1, 17),
    st.sampled_from(WORLDS),
    st.sampled_from(["reverse_kl", "forward_kl", "jsd"]),
)
def test_probabilities_of_the_kept_ids_sum_to_one(
    gloo: GlooPools, seed: int, count: int, shard: int, world_size: int, kind: str
) -> None:
    """Exact whatever the shapes; and the log-probs of all kept ids of a token are a distribution."""
    case = random_case(count, shard * world_size, seed=seed, largest_scale=5.0, kind=kind)
    case.options["kept"] = kept_with(case.targets, case.vocab_size, seed)
    assert_matches(case, gloo(world_size, run_shard, case), 1e-10)
    rows = case.options["kept"].lists()
    again = torch.arange(count).repeat_interleave(torch.tensor([len(row) for row in rows]))
    stats = replace(
        case,
        targets=case.options["kept"].ids_E.long(),
        options={"kept": case.options["kept"].at(again)},
    ).run(case.student[again], case.teacher[again])
    for logprob in (stats.student_logprob, stats.teacher_logprob):
        assert logprob is not None
        total = torch.zeros(count, dtype=logprob.dtype).index_add(0, again, logprob.exp())
        torch.testing.assert_close(total, torch.ones_like(total))


LOSSES = {
    "reverse_kl": Objective(),
    "shared jsd": Objective("jsd", beta=0.3, token_weight=TokenWeight("cumulative_share")),
    "lsm": Objective(support="teacher_topk", k=5, temperature=0.7),
    "tail": Objective(support="student_topk", k=3, remainder="sampled_tail"),
    "iw-opd": Objective("policy_gradient", token_weight=TokenWeight("cumulative_share")),
    "aopd": Objective(
        "policy_gradient", support="teacher_topk", k=4, remainder="none", gate=Gate("aopd", -0.05)
    ),
    "eopd": Objective(
        "policy_gradient",
        support="teacher_topk",
        k=4,
        remainder="none",
        gate=Gate("teacher_entropy", threshold=0.5),
    ),
    "exopd": Objective("policy_gradient", shaping=Shaping(reference_weight=1.25)),
    "minillm": Objective("policy_gradient", policy=PolicyGradient(discount=1.0, exact_step=True)),
}


def run_loss(name: str, tensor: int, chunk: int | None) -> tuple[Any, ...]:
    """This rank's part of the loss, its positions, and the gradients of hidden states and head."""
    objective = replace(LOSSES[name], kept_ids_only=True)
    tp, cp = grid(tensor)
    inputs, heads = loss_inputs()
    mine = zigzag_positions(CU_SEQLENS, cp.rank(), cp.size())
    positions = MASK[mine].nonzero()[:, 0]
    at = mine[positions]
    width = PADDED // tensor
    columns = slice(tp.rank() * width, (tp.rank() + 1) * width)
    hidden = inputs["hidden"][at].clone().requires_grad_()
    head = heads[0][columns].clone().requires_grad_()
    student: Tensor | LinearLogits = LinearLogits(hidden, head)
    teacher: Tensor | LinearLogits = LinearLogits(inputs["other"][at], heads[1][columns])
    if chunk is None:
        student, teacher = hidden @ head.T, inputs["other"][at] @ heads[1][columns].T
    stats = objective.token_stats(
        student,
        teacher,
        inputs["targets"][at],
        rollout_logprob_N=inputs["rollout"][at],
        vocab_size=VOCAB,
        group=tp,
        chunk_size=chunk,
        inplace_backward=True,
        kept=kept_with(inputs["targets"], VOCAB).at(at),
    )
    loss, _ = objective.loss(
        stats,
        positions,
        MASK[mine],
        CU_SEQLENS,
        rollout_logprob_N=inputs["rollout"][at],
        old_logprob_N=inputs["old"][at],
        reference_logprob_N=inputs["reference"][at],
        group=cp,
    )
    loss.backward()
    assert hidden.grad is not None and head.grad is not None
    if chunk is None:
        torch.distributed.all_reduce(hidden.grad, group=tp)  # with chunks the objective has done so
    return loss.detach(), at, hidden.grad, columns, head.grad


def loss_inputs() -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(4)
    inputs = packed_inputs(off_policy=True)
    inputs |= dict(zip(("hidden", "other"), torch.randn(2, len(MASK), 6, dtype=torch.float64), strict=True))
    return inputs, torch.randn(2, PADDED, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    "setting",
    covering(name=LOSSES, layout=[(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)], chunk=[None, 3]),
)
def test_losses(gloo: GlooPools, setting: dict[str, Any]) -> None:
    name, (tensor, context) = setting["name"], setting["layout"]
    inputs, heads = loss_inputs()
    hidden, head = inputs["hidden"].clone().requires_grad_(), heads[0].clone().requires_grad_()
    truth = reference.loss(
        replace(LOSSES[name], kept_ids_only=True),
        hidden @ head.T,
        inputs["other"] @ heads[1].T,
        inputs["targets"],
        MASK,
        CU_SEQLENS,
        rollout_logprob=inputs["rollout"],
        old_logprob=inputs["old"],
        reference_logprob=inputs["reference"],
        vocab_size=VOCAB,
        kept=kept_with(inputs["targets"], VOCAB),
    )
    truth.backward()
    assert hidden.grad is not None and head.grad is not None and head.grad.abs().max() > 1e-3
    results = gloo(tensor * context, run_loss, name, tensor, setting["chunk"])
    total = torch.stack([result[0] for result in results[::tensor]]).sum()
    torch.testing.assert_close(total, truth.detach(), rtol=1e-10, atol=1e-10)
    hidden_grad, head_grad = torch.zeros_like(hidden), torch.zeros_like(head)
    for rank, (_, at, of_hidden, columns, of_head) in enumerate(results):
        head_grad[columns] += of_head
        if rank % tensor == 0:
            hidden_grad[at] = of_hidden
    torch.testing.assert_close(hidden_grad, hidden.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(head_grad, head.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kept_ids_only", [True, False])
def test_importance_of_rollouts_from_a_cut(kept_ids_only: bool) -> None:
    """Equal weights: with replay the student is the policy that drew, without it gives the kept ids their mass only."""
    torch.manual_seed(5)
    student, teacher = 3 * torch.randn(2, 200, 40, dtype=torch.float64)
    probs, order = student.softmax(1).sort(1, descending=True)
    kept_NV = probs.cumsum(1) - probs < 0.9  # top_p
    kept = KeptIds.of([ids[keep] for ids, keep in zip(order, kept_NV, strict=True)])
    mass = (probs * kept_NV).sum(1)
    pick = torch.multinomial(probs * kept_NV, 1)
    targets, drawn = order.gather(1, pick)[:, 0], (probs.gather(1, pick)[:, 0] / mass).log()
    objective = Objective("policy_gradient", kept_ids_only=kept_ids_only)
    stats = objective.token_stats(student, teacher, targets, kept=kept)
    mask = torch.ones(200, dtype=torch.bool)
    _, values = objective.loss(
        stats, torch.arange(200), mask, torch.tensor([0, 200]), rollout_logprob_N=drawn
    )
    assert mass.max() < 1.0 and mass.mean() < 0.99
    expected = 200.0 if kept_ids_only else mass.sum().item()
    assert values["importance"].sum().item() == pytest.approx(expected, rel=1e-12)
