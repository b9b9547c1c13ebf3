"""Checks before the start: the objective of a configuration, the models it names, the machine."""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_opd import preflight
from megatron_opd.config.load import load_config
from megatron_opd.config.presets import PRESETS
from megatron_opd.config.schema import Config
from megatron_opd.config.section import Section
from megatron_opd.errors import UserError
from megatron_opd.objectives import Objective
from megatron_opd.preflight import (
    build_objective,
    check_before_start,
    check_devices,
    check_offload,
    check_server_gpus,
)
from tests.tiny import save_tiny_model

MINIMAL = {
    "run_dir": "r",
    "student": {"path": "s"},
    "teacher": {"path": "t"},
    "data": {"prompts": "p", "max_prompt_tokens": 32},
    "rollout": {"max_new_tokens": 32},
}


def config(objective: dict[str, Any]) -> Config:
    return Config.model_validate({**MINIMAL, "objective": objective})


def test_the_schema_and_the_objective_have_the_same_keys_and_defaults() -> None:
    assert build_objective(config({})) == Objective()
    section = config({}).objective
    outside = {"preset", "mask", "check", "head_chunk"}
    ours = {field.name for field in fields(Objective)} - {"temperature", "served_at"}
    assert ours == set(type(section).model_fields) - outside
    for name in ours:
        part = getattr(section, name)
        if isinstance(part, Section):
            assert part.model_dump() == vars(getattr(Objective(), name))


@pytest.mark.parametrize(
    ("teacher", "at"),
    [
        ({}, None),
        ({"payload": "logits"}, None),
        ({"payload": "sampled"}, 0.7),
        ({"engine": "sglang", "sglang": {"urls": ["http://a:1"]}}, 1.0),
    ],
)
def test_the_temperature_of_a_teachers_log_probs(teacher: dict[str, Any], at: float | None) -> None:
    objective = {"divergence": "policy_gradient"} if at != 1.0 else {"support": "teacher_topk"}
    sections = {"teacher": {"path": "t", **teacher}, "rollout": {"temperature": 0.7}, "objective": objective}
    assert build_objective(Config.model_validate({**MINIMAL, **sections})).served_at == at


def test_what_a_payload_lacks_is_refused_with_the_one_that_has_it() -> None:
    sections = {"teacher": {"path": "t", "payload": "topk"}, "objective": {"divergence": "jsd"}}
    with pytest.raises(
        UserError, match=r"^objective.support: jsd .* needs all logits.*teacher.payload to hidden_states$"
    ):
        build_objective(Config.model_validate({**MINIMAL, **sections}))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_an_objective(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "objective": {"preset": name}}))
    objective = build_objective(load_config(path, ["rollout.temperature=0.7"]))
    assert objective.temperature == 0.7
    for key, value in PRESETS[name].items():
        part = getattr(objective, key)
        assert part == value if not isinstance(value, dict) else vars(part) | value == vars(part)


def test_presets_that_the_paper_tells_apart_differ(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    built = {build_objective(load_config(path, [f"objective.preset={name}"])) for name in PRESETS}
    assert len(built) == len(PRESETS) == 11


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"k": 64}, r"objective\.k: 64 is read with a top-K support only: leave it at 32"),
        ({"gate": {"kind": "aopd"}}, r"objective\.gate\.kind: aopd needs divergence policy_gradient"),
        (
            {"policy": {"discount": 1.0}},
            r"objective\.policy\.discount: 1 is read with divergence policy_gradient",
        ),
        (
            {"divergence": "policy_gradient", "shaping": {"power": 5.0, "reference_weight": 1.25}},
            r"objective\.shaping\.power does not combine with a reference_weight",
        ),
    ],
)
def test_mistakes_name_the_key(objective: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        build_objective(config(objective))
    assert re.match(expected, str(caught.value)), str(caught.value)


def test_what_a_check_finds_out(tmp_path: Path) -> None:
    for name in ("s", "t", "base"):
        save_tiny_model(tmp_path / name, layers=2 if name == "base" else 4)
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    tree: dict[str, Any] = {
        **MINIMAL,
        "run_dir": str(tmp_path / "run"),
        "student": {"path": str(tmp_path / "s")},
        "teacher": {"path": str(tmp_path / "t")},
        "data": {"prompts": str(tmp_path / "p.jsonl"), "max_prompt_tokens": 32},
    }
    plain = check_before_start(Config.model_validate(tree), 1)
    assert plain.reference is None and plain.objective == Objective() and plain.parallel.data == 1
    exopd = {"divergence": "policy_gradient", "shaping": {"reference_weight": 1.25}}
    tree |= {"objective": exopd, "reference": {"path": str(tmp_path / "base")}}
    checked = check_before_start(Config.model_validate(tree), 1)
    assert checked.reference is not None and checked.reference.num_layers == 2
    assert checked.objective.shaping.reference_weight == 1.25
    with pytest.raises(UserError, match=r"2 layers of the reference: use one of 1, 2$"):
        check_before_start(Config.model_validate({**tree, "parallel": {"pipeline": 4}}), 4)
    with pytest.raises(UserError, match=r"^reference\.path: "):
        check_before_start(Config.model_validate({**tree, "reference": {"path": str(tmp_path / "no")}}), 1)


def test_every_teacher_has_to_fit(tmp_path: Path) -> None:
    for name, layers in (("s", 4), ("a", 4), ("b", 2)):
        save_tiny_model(tmp_path / name, layers=layers, vocab=240 if name == "b" else 250)
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    several = {"paths": {name: str(tmp_path / name) for name in ("a", "b")}, "weights": {"a": 1, "b": 1}}
    tree: dict[str, Any] = {
        **MINIMAL,
        "student": {"path": str(tmp_path / "s")},
        "teacher": several,
        "data": {"prompts": str(tmp_path / "p.jsonl"), "max_prompt_tokens": 32},
    }
    checked = check_before_start(Config.model_validate(tree), 1)
    assert checked.teacher is None and list(checked.teachers) == ["a", "b"]
    assert checked.vocab_size == checked.with_teacher("a").vocab_size == 240
    fourfold = Config.model_validate({**tree, "parallel": {"pipeline": 4}})
    with pytest.raises(
        UserError, match=r"^parallel\.pipeline: .* 2 layers of the teacher b: use one of 1, 2$"
    ):
        check_before_start(fourfold, 4)
    own = Config.model_validate({**tree, "teacher": {**several, "parallel": {"pipeline": 4}}})
    with pytest.raises(
        UserError, match=r"^teacher\.parallel\.pipeline: .* 2 layers of the teacher b: use one"
    ):
        check_before_start(own, 4)
    missing = {**several, "paths": {"a": str(tmp_path / "a"), "b": str(tmp_path / "no")}}
    with pytest.raises(UserError, match=r"^teacher\.paths\.b: "):
        check_before_start(Config.model_validate({**tree, "teacher": missing}), 1)


def test_a_served_teacher_is_checked_without_its_weights(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "s")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "config.json").write_text(
        '{"model_type": "unheard-of", "vocab_size": 200, "max_position_embeddings": 64}'
    )
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')

    def tree(**served: Any) -> Config:
        teacher = {"path": str(tmp_path / "t"), "engine": "sglang", "sglang": served}
        sections = {"teacher": teacher, "student": {"path": str(tmp_path / "s")}}
        data = {"prompts": str(tmp_path / "p.jsonl"), "max_prompt_tokens": 32}
        objective = {"divergence": "policy_gradient"}
        return Config.model_validate({**MINIMAL, **sections, "data": data, "objective": objective})

    checked = check_before_start(tree(urls=["http://a:1"]), 1)
    assert checked.teacher is None and checked.served is not None and checked.objective.served
    assert checked.vocab_size == 200 and len(checked.architectures) == 1
    with pytest.raises(UserError, match=r"^teacher\.path: .* has no \*\.safetensors"):
        check_before_start(tree(python=sys.executable), 1)
    with pytest.raises(UserError, match=r"^teacher\.sglang\.python: .* is no program"):
        check_before_start(tree(python=str(tmp_path / "p.jsonl")), 1)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"teacher": {"path": "t", "offload": True}}, r"teacher\.offload: without a GPU .*set it to false"),
        (
            {"reference": {"path": "t", "offload": True}},
            r"reference\.offload: without a GPU .*set it to false",
        ),
        (
            {"optimizer": {"cpu_offload": True}},
            r"optimizer\.cpu_offload: .*needs a GPU and .*set it to false",
        ),
    ],
)
def test_offload_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_offload(Config.model_validate(MINIMAL))
    offloaded = Config.model_validate({**MINIMAL, **sections})
    with pytest.raises(UserError, match=expected):
        check_offload(offloaded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(preflight, "find_spec", lambda name: name)
    check_offload(offloaded)


@pytest.mark.parametrize(("gpus", "processes", "fits"), [(0, 4, True), (4, 4, True), (4, 5, False)])
def test_one_gpu_for_every_process_where_there_are_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: int, processes: int, fits: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if fits:
        check_devices(processes)
    else:
        with pytest.raises(UserError, match="5 processes need 5 GPUs, but this machine has 4"):
            check_devices(processes)


SHARED = {"arguments": ["--mem-fraction-static=0.4"]}


@pytest.mark.parametrize(
    ("there", "rollout", "teacher", "expected"),
    [
        (0, {}, {}, None),
        (8, {"gpus": [4, 5]}, {"gpus": [7]}, None),
        (8, {"gpus": [0, 1], **SHARED}, {"gpus": [7]}, None),
        (8, SHARED, {"arguments": ["--base-gpu-id", "5"]}, None),
        (8, {"gpus": [4], **SHARED}, {"gpus": [4], **SHARED}, None),
        (0, {"gpus": [0]}, {}, r"^rollout\.sglang\.gpus: 0 is not there, this machine has no GPU"),
        (
            8,
            SHARED,
            {"gpus": [7, 8]},
            r"^teacher\.sglang\.gpus: 8 is not there, this machine has GPUs 0 to 7",
        ),
        (
            8,
            {"servers": 2},
            {"gpus": [7]},
            r"^rollout\.sglang\.gpus: GPU 0 is used by the training processes",
        ),
        (
            8,
            {"gpus": [1]},
            {"gpus": [7]},
            r"^rollout\.sglang\.gpus: GPU 1 is used by the training processes too",
        ),
        (8, {"gpus": [4]}, {"gpus": [4], **SHARED}, r"^rollout\..*: GPU 4 is used by teacher\.sglang too"),
        (8, {"gpus": [4], **SHARED}, {"gpus": [4]}, r"^teacher\..*: GPU 4 is used by rollout\.sglang too"),
    ],
)
def test_gpus_of_servers_are_there_and_their_own(
    monkeypatch: pytest.MonkeyPatch,
    there: int,
    rollout: dict[str, Any],
    teacher: dict[str, Any],
    expected: str | None,
) -> None:
    """With two training processes on the machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    tree: dict[str, Any] = {**MINIMAL, "rollout": {"sglang": {"python": "p", **rollout}}}
    tree["teacher"] = {"path": "t", "sglang": {"python": "p", **teacher}}
    if expected is None:
        return check_server_gpus(Config.model_validate(tree), 2)
    with pytest.raises(UserError, match=expected):
        check_server_gpus(Config.model_validate(tree), 2)


def test_the_gpu_that_broadcasts_the_weights_is_not_a_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    rollout = {"weight_sync": "distributed", "sglang": {"python": "p", "gpus": [0, 3], **SHARED}}
    with pytest.raises(
        UserError, match=r"^rollout\.sglang\.gpus: weight_sync distributed needs other GPUs than 0"
    ):
        check_server_gpus(Config.model_validate({**MINIMAL, "rollout": rollout}), 1)
