"""The validated table: what goes together builds, what does not is refused in one line that starts with the key."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import pytest

from megatron_opd.objectives.gates import Gate
from megatron_opd.objectives.objective import Objective
from megatron_opd.objectives.policy_gradient import PolicyGradient
from megatron_opd.objectives.shaping import Shaping
from megatron_opd.objectives.token_weights import TOKEN_WEIGHT_FIELDS, TokenWeight

PG = {"divergence": "policy_gradient"}
TOPK = {"support": "teacher_topk"}
UNION = {"support": "student_topk_sampled"}
AOPD = {**PG, **TOPK, "gate": Gate("aopd")}
MINILLM = PolicyGradient(discount=1.0, exact_step=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"divergence": "jsd", "beta": 0.1},
        {"divergence": "forward_kl", **TOPK, "remainder": "bucket", "k": 1},
        {**UNION, "k": 1},
        {**UNION, "remainder": "bucket"},
        {**UNION, "remainder": "mass_correction"},
        {**TOPK, "remainder": "sampled_tail", "policy": PolicyGradient(importance_cap=None)},
        PG,
        {**PG, "policy": PolicyGradient(discount=0.5, baseline="reverse_kl")},
        {**PG, "policy": MINILLM},
        {**PG, "shaping": Shaping(reference_weight=1.25, clip=5.0)},
        {**PG, "shaping": Shaping(power=5.0)},
        AOPD,
        {**AOPD, "gate": Gate("aopd", tau=1.0, coefficient=0.5, divergence="reverse_kl"), "k": 4},
        {
            **AOPD,
            "gate": Gate("teacher_entropy", threshold=0.5, divergence="reverse_kl"),
            "remainder": "sampled_tail",
        },
        {"token_weight": TokenWeight("prefix_window", gamma=1.0, floor=0.0, fraction=0.5)},
    ],
)
def test_what_goes_together(settings: dict[str, Any]) -> None:
    objective = Objective(**settings)
    assert all(getattr(objective, name) == value for name, value in settings.items())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"divergence": "kl"},
            r"divergence: unknown 'kl': use one of reverse_kl, forward_kl, jsd, policy_grad",
        ),
        ({"support": "topk"}, r"support: unknown 'topk': use one of full, teacher_topk"),
        ({"remainder": "tail"}, r"remainder: unknown 'tail': use one of renormalize"),
        (
            {**PG, "policy": PolicyGradient(discount=0.5, baseline="reverse_kl", length_normalized=True)},
            r"policy\.baseline: reverse_kl is the expected reward without policy\.length_normalized: set policy",
        ),
        (
            {**PG, "policy": PolicyGradient(baseline="reverse_kl"), "shaping": Shaping(power=5.0)},
            r"policy\.baseline: reverse_kl is the expected reward without shaping\.power: set policy",
        ),
        (
            {**AOPD, "gate": Gate("aopd", coefficient=0.0)},
            r"gate\.coefficient: 0 leaves nothing of what gate",
        ),
        (
            {"token_weight": TokenWeight("curriculum", floor=0.0, fraction=0.0)},
            r"token_weight\.fraction: 0 with token_weight\.floor 0 makes every weight 0",
        ),
        # support, gate, divergence
        (
            {"divergence": "jsd", **TOPK},
            r"support: jsd needs the whole vocabulary, not teacher_topk: set supp",
        ),
        ({"divergence": "jsd", "beta": 0.0}, r"beta: must lie between 0 and 1, not 0: .* forward_kl"),
        ({"divergence": "jsd", "beta": 1.0}, r"beta: must lie between 0 and 1, not 1: .* reverse_kl"),
        ({**PG, **TOPK}, r"support: teacher_topk has no effect, policy_gradient .* set support to full"),
        ({**PG, **UNION}, r"support: student_topk_sampled has no effect"),
        (
            {**TOPK, "gate": Gate("aopd")},
            r"gate\.kind: aopd needs divergence policy_gradient, not reverse_kl",
        ),
        ({"gate": Gate("teacher_entropy")}, r"gate\.kind: teacher_entropy needs divergence policy_gradient"),
        ({**PG, "gate": Gate("aopd")}, r"support: gate aopd adds a top-K .*set support to teacher_topk"),
        # K and remainder
        ({**TOPK, "k": 0}, r"k: must be at least 1, not 0"),
        ({**TOPK, "k": 1}, r"k: 1 with remainder renormalize .* set remainder to bucket"),
        (
            {"divergence": "forward_kl", **TOPK, "remainder": "sampled_tail"},
            r"remainder: sampled_tail needs a reverse_kl divergence, not forward_kl: set divergence to reverse",
        ),
        (
            {**AOPD, "remainder": "sampled_tail"},
            r"remainder: sampled_tail needs .*not forward_kl: set gate\.divergence to reverse_kl",
        ),
        (
            {**UNION, "remainder": "sampled_tail"},
            r"remainder: sampled_tail never applies with support student_topk_sampled.* to student_topk, or",
        ),
        # policy gradient and shaping
        (
            {**PG, "policy": PolicyGradient(exact_step=True)},
            r"policy\.exact_step: with discount 0 .*reverse_kl",
        ),
        (
            {**PG, "policy": PolicyGradient(discount=1.0, exact_step=True, baseline="reverse_kl")},
            r"policy\.baseline: reverse_kl is the expected reward .*exact_step to false",
        ),
        (
            {**PG, "policy": PolicyGradient(length_normalized=True)},
            r"policy\.length_normalized: with discount 0",
        ),
        (
            {**PG, "policy": MINILLM, "shaping": Shaping(clip=5.0)},
            r"shaping\.clip: exact_step computes the uns",
        ),
        (
            {**PG, "policy": MINILLM, "shaping": Shaping(power=5.0)},
            r"shaping\.power: exact_step computes the u",
        ),
        ({**PG, "shaping": Shaping(power=5.0, clip=0.5)}, r"shaping\.power: .* combine with shaping\.clip"),
        # token weights that are 0 everywhere
        (
            {"token_weight": TokenWeight("increasing", gamma=0.0, floor=0.0)},
            r"token_weight\.gamma: 0 with token_weight\.floor 0 makes every weight 0",
        ),
        (
            {"token_weight": TokenWeight("suffix_window", floor=0.0, fraction=0.0)},
            r"token_weight\.fraction: 0 with token_weight\.floor 0",
        ),
        # set in vain
        ({"beta": 0.3}, r"beta: 0\.3 is read with divergence jsd only: leave it at 0\.5, or use that$"),
        ({**PG, "beta": 0.3}, r"beta: 0\.3 is read with divergence jsd only"),
        ({"k": 64}, r"k: 64 is read with a top-K support only: leave it at 32, or use that$"),
        ({"remainder": "bucket"}, r"remainder: bucket is read with a top-K support only: leave it at renorm"),
        ({**PG, "k": 64}, r"k: 64 is read with a top-K support only"),
        (
            {"gate": Gate(tau=0.5)},
            r"gate\.tau: 0\.5 is read with gate\.kind aopd only: leave it at 0, or use",
        ),
        (
            {**AOPD, "gate": Gate("teacher_entropy", tau=0.5)},
            r"gate\.tau: 0\.5 is read with gate\.kind aopd only",
        ),
        (
            {**AOPD, "gate": Gate("aopd", threshold=0.1)},
            r"gate\.threshold: 0\.1 is read with gate\.kind teacher_entropy only: leave it at 0\.8",
        ),
        (
            {**PG, "gate": Gate(coefficient=2.0)},
            r"gate\.coefficient: 2 is read with gate\.kind aopd or teacher_e",
        ),
        (
            {**PG, "gate": Gate(divergence="reverse_kl")},
            r"gate\.divergence: reverse_kl is read with gate\.kind a",
        ),
        (
            {"policy": PolicyGradient(discount=1.0)},
            r"policy\.discount: 1 is read with divergence policy_gradient only: leave it at 0, or use that$",
        ),
        (
            {**TOPK, "policy": PolicyGradient(importance_cap=2.0)},
            r"policy\.importance_cap: 2 is read with divergence policy_gradient only",
        ),
        (
            {**TOPK, "remainder": "sampled_tail", "policy": PolicyGradient(dual_clip=None)},
            r"policy\.dual_clip: null is read with divergence policy_gradient only: leave it at 3",
        ),
        (
            {"policy": PolicyGradient(exact_step=True)},
            r"policy\.exact_step: true is read with .*leave it at false",
        ),
        (
            {"shaping": Shaping(clip=5.0)},
            r"shaping\.clip: 5 is read with .*policy_gradient only: leave it at null",
        ),
        (
            {"token_weight": TokenWeight(gamma=0.25)},
            r"token_weight\.gamma: 0\.25 is read with token_weight\.kind",
        ),
        (
            {"token_weight": TokenWeight("linear_decay", signed=True)},
            r"token_weight\.signed: true is read with token_weight\.kind cumulative_share only: leave it at false",
        ),
        (
            {"token_weight": TokenWeight("cumulative_share", alpha=1.0)},
            r"token_weight\.alpha: 1 is read with token_weight\.kind prefix_ratio only",
        ),
    ],
)
def test_what_does_not_go_together(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        Objective(**settings)
    assert re.match(expected, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", TOKEN_WEIGHT_FIELDS)
def test_a_token_weight_takes_exactly_the_fields_its_kind_reads(kind: str) -> None:
    others: dict[str, Any] = {
        "gamma": 0.25,
        "floor": 0.5,
        "signed": True,
        "alpha": 0.5,
        "clip": 3.0,
        "fraction": 0.5,
        "unit_mean": True,
    }
    assert set(others) == {field.name for field in fields(TokenWeight)} - {"kind"}
    for name, value in others.items():
        weight = TokenWeight(kind, **{name: value})
        if name in TOKEN_WEIGHT_FIELDS[kind]:
            Objective(token_weight=weight)
        else:
            with pytest.raises(ValueError, match=rf"^token_weight\.{name}: .* is read with"):
                Objective(token_weight=weight)
