"""The keys of several teachers: what goes together, and what is refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_opd.config.load import load_config, save_resolved
from megatron_opd.config.several_teachers import check_several_teachers
from megatron_opd.errors import UserError
from tests.config.test_checks import config

PATHS = {"paths": {"math": "m", "code": "c"}}
WEIGHTS = {"weights": {"math": 2, "code": 1}}
SEVERAL = {"path": None, **PATHS}
SERVERS = {"engine": "sglang", "sglang": {"urls": ["http://a:1"]}}


@pytest.mark.parametrize("teacher", [{}, SEVERAL | WEIGHTS, SEVERAL | {"route_field": "domain"}])
def test_what_goes(teacher: dict[str, Any]) -> None:
    check_several_teachers(config(teacher=teacher))


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        (WEIGHTS, r"^teacher\.weights: teacher\.path is the only teacher: remove it"),
        ({"route_field": "domain"}, r"^teacher\.route_field: teacher\.path is the only teacher: remove it"),
        (PATHS | WEIGHTS, r"^teacher\.path: teacher\.paths names the teachers: remove one"),
        (SEVERAL, r"^teacher\.paths: give either teacher\.route_field, .* or teacher\.weights"),
        (SEVERAL | WEIGHTS | {"route_field": "domain"}, r"^teacher\.paths: give either"),
        (SEVERAL | {"weights": {"math": 1}}, r"^teacher\.paths\.code: is not in teacher\.weights: add it"),
        (
            SEVERAL | {"weights": {"math": 1, "code": 1, "art": 1}},
            r"^teacher\.weights\.art: is not in teacher\.paths: add it",
        ),
        (SEVERAL | WEIGHTS | SERVERS, r"^teacher\.paths: servers serve one teacher"),
        (
            SEVERAL | WEIGHTS | {"parallel": {"separate": True}},
            r"^teacher\.parallel\.separate: several teachers are on the student's processes: set it to false",
        ),
    ],
)
def test_mistakes(teacher: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        check_several_teachers(config(teacher=teacher))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tree = {"run_dir": "r", "student": {"path": "s"}, "data": {"prompts": "p"}, "teacher": PATHS | WEIGHTS}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_file_and_overrides_name_them(file: Path, tmp_path: Path) -> None:
    loaded = load_config(file, ["teacher.paths.code=other", "teacher.weights.math=3"])
    assert loaded.teacher.folders == {"teacher.paths.math": Path("m"), "teacher.paths.code": Path("other")}
    assert loaded.teacher.weights == {"math": 3.0, "code": 1.0}
    one = loaded.with_teacher("code").teacher
    assert one.folders == {"teacher.path": Path("other")} and one.folder == Path("other") and not one.weights
    assert load_config(save_resolved(loaded, tmp_path / "run")) == loaded


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("teacher.paths=null", r"^teacher\.paths: "),
        ("teacher.weights.code=0", r"^teacher\.weights\.code: must be greater than 0, got 0"),
        ("teacher.paths={a/b: x}", r"^teacher\.paths\.a/b: "),
    ],
)
def test_values_that_do_not_fit(file: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_config(file, [override])


def test_without_any_teacher_its_path_is_missing(file: Path) -> None:
    file.write_text("run_dir: r\nstudent: {path: s}\ndata: {prompts: p}\n")
    with pytest.raises(UserError, match=r"^missing key 'teacher\.path' in "):
        load_config(file)
