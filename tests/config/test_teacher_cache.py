"""What a teacher whose answers are kept refuses at start-up."""

from pathlib import Path
from typing import Any

import pytest

from megatron_opd.errors import UserError
from megatron_opd.preflight import check_before_start, check_models
from tests.config.test_self_distillation import config_of
from tests.tiny import save_tiny_model

SERVED: dict[str, Any] = {
    "teacher__engine": "sglang",
    "teacher__sglang__urls": "[http://127.0.0.1:9]",
    "objective__k": 4,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "student")
    (folder / "headless").mkdir()
    (folder / "headless" / "config.json").write_bytes((folder / "student" / "config.json").read_bytes())
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher__cache": "null", "teacher__cache_gb": 3},
            "teacher.cache_gb: read with teacher.cache only",
        ),
        ({"teacher__ema": 0.9}, "teacher.cache: the weights of a teacher that follows"),
        (
            {**SERVED, "objective__support": "student_topk", "objective__remainder": "bucket"},
            "teacher.cache: servers are asked about the student's likeliest ids",
        ),
    ],
)
def test_refusals(models: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = config_of(models, tmp_path, **{"teacher__cache": tmp_path / "cache", **changes})
    with pytest.raises(UserError) as caught:
        check_models(config, 1)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("engine", [{}, {**SERVED, "objective__preset": "lsm"}])
def test_what_can_be_kept(models: Path, tmp_path: Path, engine: dict[str, Any]) -> None:
    prompts: dict[str, Any] = {"data__prompts": models / "prompts.jsonl"}
    check_before_start(config_of(models, tmp_path, teacher__cache=tmp_path / "cache", **engine, **prompts), 1)


def test_folders(models: Path, tmp_path: Path) -> None:
    prompts: dict[str, Any] = {"data__prompts": models / "prompts.jsonl"}
    with pytest.raises(UserError, match="is a file, not a folder"):
        check_before_start(config_of(models, tmp_path, teacher__cache=models / "prompts.jsonl", **prompts), 1)
    served = {**SERVED, "objective__preset": "lsm", "teacher__path": models / "headless"}
    with pytest.raises(
        UserError, match=r"teacher\.cache: teacher\.path .* has no weights to know the teacher by"
    ):
        check_before_start(
            config_of(models, tmp_path, teacher__cache=tmp_path / "cache", **served, **prompts), 1
        )
