"""Conditions between keys, models and processes: what fits passes, what does not is named in one line."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest

from megatron_opd.config.checks import check_fields, check_layout
from megatron_opd.config.layout_checks import data_parallel_size, processes_needed
from megatron_opd.config.schema import Config, ParallelConfig
from megatron_opd.errors import UserError


@dataclass(frozen=True)
class Sizes:
    num_layers: int = 24
    num_heads: int = 8
    num_kv_groups: int = 4
    vocab_size: int = 1000
    max_positions: int = 4096
    num_experts: int = 0
    ffn_size: int = 64


def config(**sections: dict[str, Any]) -> Config:
    """A configuration that fits `Sizes()` on one process, with the keys of `sections` changed."""
    tree: dict[str, dict[str, Any]] = {
        "student": {"path": "s"},
        "teacher": {"path": "t"},
        "data": {"prompts": "p", "max_prompt_tokens": 512},
        "rollout": {"prompts_per_step": 6, "samples_per_prompt": 2, "max_new_tokens": 512},
        "training": {"steps": 10, "microbatch_tokens": 1024},
    }
    for name, keys in sections.items():
        tree[name] = {**tree.get(name, {}), **keys}
    return Config.model_validate({"run_dir": "r", **tree})


@pytest.mark.parametrize(
    ("parallel", "world_size"),
    [
        ({}, 1),
        ({}, 4),
        ({"tensor": 4, "pipeline": 3}, 12),
        ({"tensor": 2, "sequence_parallel": True, "data": 3}, 6),
        ({"pipeline": 24}, 24),
        ({"pipeline": 4, "virtual_pipeline": 6}, 4),
        ({}, 5),  # 12 rollouts, dealt unevenly
    ],
)
def test_layouts_that_fit(parallel: dict[str, Any], world_size: int) -> None:
    layout = check_layout(config(parallel=parallel), Sizes(), Sizes(num_layers=48), world_size)
    assert processes_needed(layout) == world_size
    assert layout.data is not None and layout.sequence_parallel == parallel.get("sequence_parallel", False)


def test_a_budget_need_not_be_a_multiple_of_the_segments():
    odd = config(parallel={"context": 3}, training={"microbatch_tokens": 1027})
    assert check_layout(odd, Sizes(), Sizes(), 3).context == 3


EXPERTS = Sizes(num_experts=6)


@pytest.mark.parametrize(
    ("parallel", "world_size"),
    [
        ({"expert": 2}, 2),
        ({"expert": 3, "pipeline": 2}, 6),
        ({"expert": 2, "tensor": 2, "sequence_parallel": True}, 2),
    ],
)
def test_layouts_that_fit_experts(parallel: dict[str, Any], world_size: int) -> None:
    for student, teacher in ((EXPERTS, Sizes()), (Sizes(), EXPERTS)):
        assert (
            check_layout(config(parallel=parallel), student, teacher, world_size).expert == parallel["expert"]
        )


@pytest.mark.parametrize(
    ("parallel", "teacher", "expected"),
    [
        ({"expert": 4}, EXPERTS, r"parallel\.expert: 4 does not divide the 6 experts of the teacher"),
        ({"expert": 2}, Sizes(), r"parallel\.expert: .*no model has any: set it to 1"),
        ({"expert": 3}, EXPERTS, r"parallel\.expert: 3 does not divide .* = 2: lower it"),
        ({"tensor": 2}, EXPERTS, r"parallel\.sequence_parallel: the teacher has experts.*set it to true"),
    ],
)
def test_layouts_that_do_not_fit_experts(parallel: dict[str, Any], teacher: Sizes, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        check_layout(config(parallel=parallel), Sizes(), teacher, 2)


def test_tensor_parallelism_cuts_the_feed_forward_part_of_dense_models_only() -> None:
    halved = config(parallel={"tensor": 2, "sequence_parallel": True})
    odd = Sizes(ffn_size=97)
    check_layout(halved, replace(odd, num_experts=4), Sizes(), 2)
    with pytest.raises(
        UserError, match=r"^parallel\.tensor: 2 .*97 feed-forward channels of the student: use one of 1$"
    ):
        check_layout(halved, odd, Sizes(), 2)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (
            {"save_every": 20, "keep_every": 30},
            r"30 is no multiple of checkpoint\.save_every, .* every 20 steps: ",
        ),
        ({"save_every": 0, "keep_every": 30}, r"30 is no multiple .* only the last step is saved: "),
    ],
)
def test_checkpoints_kept_for_good_are_saved_at_all(section: dict[str, int], expected: str) -> None:
    check_fields(config(checkpoint={"save_every": 20, "keep_every": 40}))
    with pytest.raises(UserError, match=rf"^checkpoint\.keep_every: {expected}change one of them, or set"):
        check_fields(config(checkpoint=section))


def test_a_balancing_loss_needs_experts_in_the_student() -> None:
    balanced = config(training={"moe_aux_loss": 0.01})
    check_layout(balanced, EXPERTS, Sizes(), 1)
    with pytest.raises(
        UserError, match=r"^training\.moe_aux_loss: the student has no experts.*leave it null$"
    ):
        check_layout(balanced, Sizes(), EXPERTS, 1)


@pytest.mark.parametrize(
    ("sections", "world_size", "expected"),
    [
        (
            {"parallel": {"tensor": 3}},
            3,
            r"parallel\.tensor: 3 .*8 attention heads of the student: use one of 1, 2, 4",
        ),
        ({"parallel": {"tensor": 8}}, 8, r"parallel\.tensor: 8 .*4 key-value heads of the student"),
        ({"parallel": {"pipeline": 5}}, 5, r"parallel\.pipeline: 5 .*24 layers of the student"),
        (
            {"parallel": {"pipeline": 4, "virtual_pipeline": 4}},
            4,
            r"parallel\.virtual_pipeline: 4 .* 6 layers of the student in a .* process: use one of 1, 2, 3, 6",
        ),
        (
            {"parallel": {"virtual_pipeline": 2}},
            1,
            r"parallel\.virtual_pipeline: needs parallel\.pipeline > 1: set it to 1",
        ),
        ({"parallel": {"pipeline": 2, "data": 2}}, 2, r"parallel: .* is 4, but 2 processes run"),
        ({"parallel": {"pipeline": 2}}, 3, r"parallel: .* is 2, which does not divide the 3 processes"),
        (
            {
                "parallel": {"context": 2, "tensor": 4, "sequence_parallel": True},
                "rollout": {"max_new_tokens": 513},
                "training": {"microbatch_tokens": 1024},
            },
            8,
            r"training\.microbatch_tokens: 1024 cannot hold .* 1025 tokens: raise it to 1040",
        ),
        (
            {"parallel": {"sequence_parallel": True}},
            1,
            r"parallel\.sequence_parallel: needs parallel\.tensor > 1",
        ),
        (
            {},
            13,
            r"rollout\.prompts_per_step: 6 prompts of 2 samples .* 13 data-parallel replicas without any",
        ),
        (
            {"rollout": {"max_new_tokens": 513}},
            1,
            r"training\.microbatch_tokens: 1024 cannot hold .*raise it to 1025",
        ),
        (
            {
                "parallel": {"tensor": 4, "sequence_parallel": True},
                "rollout": {"max_new_tokens": 513},
                "training": {"microbatch_tokens": 1024},
            },
            4,
            r"training\.microbatch_tokens: 1024 cannot hold .* 1025 tokens: raise it to 1028",
        ),
        (
            {"rollout": {"max_new_tokens": 4000}, "training": {"microbatch_tokens": 8192}},
            1,
            r"rollout\.max_new_tokens: .* = 4512 tokens, but the student has 4096 positions",
        ),
        (
            {"rollout": {"top_k": 1001}},
            1,
            r"rollout\.top_k: 1001 is more than the 1000 tokens of the student",
        ),
        (
            {"optimizer": {"warmup_steps": 11}},
            1,
            r"optimizer\.warmup_steps: 11 is more than training\.steps = 10",
        ),
        (
            {"optimizer": {"lr": 1e-5, "min_lr": 1e-4}},
            1,
            r"optimizer\.min_lr: 0\.0001 is more than optimizer\.lr",
        ),
        ({"optimizer": {"name": "sgd", "beta1": 0.5}}, 1, r"optimizer\.beta1: only adam reads it: remove it"),
        ({"optimizer": {"name": "sgd", "eps": 1e-6}}, 1, r"optimizer\.eps: only adam reads it"),
        ({"optimizer": {"name": "sgd", "distributed": True}}, 2, r"optimizer\.distributed: .*leave it null"),
        ({"evaluation": {"every": 5}}, 1, r"evaluation\.every: .*give evaluation\.prompts"),
        (
            {"training": {"updates_per_rollout": 13}},
            1,
            r"training\.updates_per_rollout: 13 updates need a rollout each, but a step has 12 .*lower it",
        ),
        (
            {"objective": {"shaping": {"reference_weight": 1.25}}},
            1,
            r"reference: objective\.shaping\.reference_weight = 1\.25 needs a reference model: give reference\.p",
        ),
        (
            {
                "objective": {"divergence": "policy_gradient", "policy": {"baseline": "reverse_kl"}},
                "training": {"updates_per_rollout": 2},
            },
            1,
            r"objective\.policy\.baseline: .* training\.updates_per_rollout to 1",
        ),
        (
            {"objective": {"support": "teacher_topk", "k": 10**6}},
            1,
            r"objective\.k: 1000000 is more than the student's vocabulary of \d+: lower it",
        ),
        ({"reference": {"path": "r"}}, 1, r"reference: nothing reads this model .*remove reference"),
        (
            {"objective": {"mask": {"occurrences": "all"}}},
            1,
            r"objective\.mask\.occurrences: all is read with objective\.mask\.tokens only",
        ),
    ],
)
def test_layouts_that_do_not_fit(sections: dict[str, Any], world_size: int, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        check_layout(config(**sections), Sizes(), Sizes(), world_size)
    assert re.match(expected, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("teacher", "sections", "expected"),
    [
        (
            Sizes(num_heads=9, num_kv_groups=3),
            {"parallel": {"tensor": 2}},
            r"9 attention heads of the teacher",
        ),
        (
            Sizes(num_kv_groups=1),
            {"parallel": {"tensor": 2}},
            r"1 key-value heads of the teacher: use one of 1$",
        ),
        (Sizes(num_layers=27), {"parallel": {"pipeline": 2}}, r"27 layers of the teacher: use one of 1, 3$"),
        (Sizes(max_positions=1023), {}, r"the teacher has 1023 positions"),
        (Sizes(vocab_size=10), {"rollout": {"top_k": 11}}, r"10 tokens of the teacher's vocabulary"),
    ],
)
def test_the_teacher_has_to_fit_too(teacher: Sizes, sections: dict[str, Any], expected: str) -> None:
    world_size = 2 if "parallel" in sections else 1
    check_layout(config(**sections), replace(teacher, **vars(Sizes())), Sizes(), world_size)
    with pytest.raises(UserError, match=expected):
        check_layout(config(**sections), Sizes(), teacher, world_size)


def test_the_reference_has_to_fit_too() -> None:
    exopd: dict[str, Any] = {"objective": {"shaping": {"reference_weight": 1.25}}, "reference": {"path": "r"}}
    fitting = config(**exopd, parallel={"pipeline": 2})
    check_layout(fitting, Sizes(), Sizes(), 2, Sizes(num_layers=12))
    with pytest.raises(UserError, match=r"27 layers of the reference: use one of 1, 3$"):
        check_layout(fitting, Sizes(), Sizes(), 2, Sizes(num_layers=27))
    with pytest.raises(UserError, match=r"the reference has 1023 positions"):
        check_layout(config(**exopd), Sizes(), Sizes(), 1, Sizes(max_positions=1023))


def test_limits_are_inclusive() -> None:
    exact = config(
        optimizer={"name": "sgd", "weight_decay": 0.1, "warmup_steps": 10, "lr": 1e-5, "min_lr": 1e-5},
        rollout={"top_k": 1000},
        training={"updates_per_rollout": 12},
    )
    check_layout(exact, Sizes(max_positions=1024), Sizes(max_positions=1024), 1)


def test_fields_need_no_model() -> None:
    check_fields(config())
    with pytest.raises(UserError, match="warmup_steps"):
        check_fields(config(optimizer={"warmup_steps": 11}))


def test_processes_and_replicas() -> None:
    open_layout = ParallelConfig(tensor=2, pipeline=3)
    assert processes_needed(open_layout) == 6
    assert processes_needed(ParallelConfig(tensor=2, data=4)) == 8
    assert data_parallel_size(open_layout, 6) == 1
    assert data_parallel_size(open_layout, 24) == 4
    assert data_parallel_size(ParallelConfig(data=4), 4) == 4


@pytest.mark.parametrize("rollout", [{"top_p": 0.9}, {"top_k": 2}, {"top_p": 0.5, "top_k": 50}])
def test_replay_of_kept_ids_needs_a_cut(rollout: dict[str, Any]) -> None:
    check_fields(config(rollout=rollout, objective={"kept_ids_only": True}))


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({}, "objective.kept_ids_only: sampling keeps every id: set rollout.top_p"),
        ({"top_k": 1}, "objective.kept_ids_only: rollout.top_k = 1 keeps one id"),
    ],
)
def test_kept_ids_that_teach_nothing(rollout: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_fields(config(rollout=rollout, objective={"kept_ids_only": True}))
