"""What a teacher with prompts of its own, or one that follows the student, refuses at start-up."""

from pathlib import Path
from typing import Any

import pytest

from megatron_opd.config.load import load_config
from megatron_opd.config.schema import Config
from megatron_opd.config.self_distillation import template_fields
from megatron_opd.errors import UserError
from megatron_opd.preflight import check_models
from tests.tiny import save_tiny_model

TEMPLATE = "'{prompt} {solution}'"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "student")
    save_tiny_model(folder / "other", seed=3)
    save_tiny_model(folder / "wide", hidden=96)
    return folder


def config_of(models: Path, folder: Path, **changes: Any) -> Config:
    path = folder / "run.yaml"
    path.write_text("{}\n")
    values = {
        "run_dir": folder / "run",
        "student.path": models / "student",
        "teacher.path": models / "student",
        "data.prompts": "none.jsonl",
        "data.max_prompt_tokens": 20,
        "rollout.max_new_tokens": 10,
        "training.microbatch_tokens": 64,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(path, [f"{key}={value}" for key, value in values.items()])


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher__prompt_template": TEMPLATE, "teacher__max_prompt_tokens": 54},
        {"teacher__prompt_template": TEMPLATE},
        {"teacher__ema": 0.99},
        {"teacher__ema": 0.5, "teacher__path": "other"},
    ],
)
def test_what_goes(models, tmp_path, changes):
    if "teacher__path" in changes:
        changes = changes | {"teacher__path": models / "other"}
    check_models(config_of(models, tmp_path, **changes), 1)


SERVED = {
    "teacher__engine": "sglang",
    "teacher__sglang__urls": "['http://127.0.0.1:1']",
    "objective__preset": "opd",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher__max_prompt_tokens": 9},
            r"teacher\.max_prompt_tokens: read with teacher\.prompt_template",
        ),
        ({"teacher__prompt_template": "'a {prompt'"}, r"teacher\.prompt_template: .*\{\{ and \}\}"),
        ({"teacher__prompt_template": "plain"}, r"teacher\.prompt_template: names no field"),
        (
            {"teacher__prompt_template": TEMPLATE, "teacher__max_prompt_tokens": 55},
            r"training\.microbatch_tokens: 64 cannot hold teacher\.max_prompt_tokens .* 65 tokens",
        ),
        (
            {
                "teacher__prompt_template": TEMPLATE,
                "teacher__max_prompt_tokens": 119,
                "training__microbatch_tokens": 512,
            },
            r"teacher\.max_prompt_tokens .* = 129 tokens, but the teacher has 128 positions",
        ),
        ({"teacher__ema": 1.0}, r"teacher\.ema"),
        ({"teacher__ema": 0.9, "teacher__path": "wide"}, r"teacher\.ema: .* its hidden_size is 96, not 64"),
        ({"teacher__ema": 0.9, **SERVED}, r"teacher\.ema: servers keep the weights"),
        (
            {"teacher__ema": 0.9, "teacher__parallel": {"separate": True}},
            r"teacher\.ema: .*teacher\.parallel null",
        ),
        ({"teacher__ema": 0.9, "teacher__offload": True}, r"teacher\.ema: .*teacher\.offload to false"),
        ({"teacher__ema": 0.9, "optimizer__cpu_offload": True}, r"teacher\.ema: .*optimizer\.cpu_offload"),
    ],
)
def test_what_is_refused(models, tmp_path, changes, message):
    if "teacher__path" in changes:
        changes = changes | {"teacher__path": models / changes["teacher__path"]}
    with pytest.raises(UserError, match=message) as caught:
        check_models(config_of(models, tmp_path, **changes), 1)
    assert len(str(caught.value).splitlines()) == 1


def test_fields_of_a_template():
    assert template_fields("{prompt} \\boxed{{{answer}}} {prompt} {a field}") == [
        "prompt",
        "answer",
        "a field",
    ]


@pytest.mark.parametrize("template", ["{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>5}", "{a", "a}", "{{a}}"])
def test_what_is_no_template(template):
    with pytest.raises(UserError, match=r"^teacher\.prompt_template: "):
        template_fields(template)
