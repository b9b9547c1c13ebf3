"""`megatron-opd plan`: its report, its exit codes, and that it asks for no more than the models' config.json."""

import json
from pathlib import Path

import pytest

from megatron_opd.cli import main

ROOT = Path(__file__).parents[1]
PLANS = sorted((ROOT / "examples/plans").glob("*.yaml"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["plan", *arguments])
    return int(end.value.code or 0)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_shipped_plans_fit_and_their_reports_are_current(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(path.relative_to(ROOT))) == 0
    report = capsys.readouterr().out
    assert report.strip() in (ROOT / "examples/plans/README.md").read_text(), "print it again into the README"
    lines = report.splitlines()
    assert sum(line.startswith(("memory: fits", "time: ")) for line in lines) == 2
    assert max(map(len, lines)) < 200 and not (ROOT / "prompts.jsonl").exists()


def test_json_is_one_object_whose_parts_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(PLANS[0]), "--json", "rollout.max_batch=8") == 0
    told = json.loads(capsys.readouterr().out)
    for stage in told["memory"]:
        assert stage["total"] == sum(stage["always"].values()) + sum(stage["phases"][stage["peak"]].values())
    assert told["step_seconds"] == pytest.approx(sum(sum(span.values()) for span in told["seconds"].values()))
    assert told["fits"] is True and told["layout"]["processes"] == 512


def test_what_does_not_fit_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    path = "examples/plans/qwen3-30b-a3b-to-4b.yaml"
    assert run(path, "rollout.max_batch=null", "--hardware", "a100-80gb") == 1
    told = capsys.readouterr().out
    assert "DOES NOT FIT" in told and "tried, and smaller" in told
    assert run(path, "rollout.max_batch=null", "--hardware", "h200-141gb") == 0


def test_what_servers_do_is_said_not_to_be_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    path, url = "examples/plans/qwen3-30b-a3b-to-4b.yaml", "[http://127.0.0.1:1]"
    teacher = [
        "teacher.engine=sglang",
        f"teacher.sglang.urls={url}",
        "objective.preset=lsm",
        "parallel.expert=1",
    ]
    assert run(path, *teacher, "objective.k=16") == 0
    told = capsys.readouterr().out
    assert "behind SGLang servers, which give 132 bytes a response token" in told
    assert (
        "without what servers take" in told and "Not predicted: memory and time of the SGLang servers" in told
    )
    assert "teacher weights" not in told and "key-value cache" in told and "decoding" in told
    rollouts = ["rollout.engine=sglang", f"rollout.sglang.urls={url}", "rollout.max_batch=null"]
    assert run(path, *teacher, *rollouts, "--json") == 0
    both = json.loads(capsys.readouterr().out)
    assert both["served"] == {"teacher": True, "rollouts": True, "payload_bytes": 260}
    assert set(both["models"]) == {"student"} and set(both["seconds"]) == {"scoring", "training", "optimizer"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["parallel.tensor=8"], "parallel.tensor: 8 does not divide the 4 key-value heads of the teacher"),
        (["--processes", "30"], "but 30 processes run"),
        (["student.path=nowhere"], "student.path: model folder not found"),
        (["--hardware", "h1000"], "--hardware: h1000 is no file"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("examples/plans/qwen3-30b-a3b-to-4b.yaml", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert said in error[-1] and error[-1].startswith("error: ")


def test_the_ranks_of_a_teacher_in_a_layout_of_its_own_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    own = ["parallel.expert=1", "teacher.parallel.separate=true", "teacher.parallel.data=8"]
    path = "examples/plans/qwen3-30b-a3b-to-4b.yaml"
    assert run(path, *own, "teacher.parallel.expert=8") == 0
    told = capsys.readouterr().out
    assert "teacher    TP1·PP1·CP1·DP8·EP8 on processes 32 to 39" in told
    assert "4096 bytes a response token to each of 4 ranks" in told and "│ waiting " in told
    assert "Memory of the fullest rank (teacher's stage 0, in scoring)" in told and "teacher 0" in told
    assert run(path, *own, "teacher.parallel.expert=8", "--json") == 0
    theirs = json.loads(capsys.readouterr().out)["own_teacher"]
    assert theirs["first_rank"] == 32 and theirs["layout"]["processes"] == 8
    assert set(theirs["payload"]["sent"]) == {str(rank) for rank in range(32, 40)}
    assert run(path, "parallel.expert=1", "teacher.parallel.separate=true", "teacher.parallel.tensor=3") == 2
    assert "error: teacher.parallel.tensor: 3 does not divide" in capsys.readouterr().err


def test_several_teachers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    folder = "examples/plans/models/Qwen3-4B"
    several = [
        "teacher.path=null",
        f"teacher.paths={{a: {folder}, b: {folder}}}",
        "teacher.route_field=domain",
    ]
    assert run("examples/plans/qwen3-30b-a3b-to-4b.yaml", "parallel.expert=1", *several) == 2
    assert "error: teacher.paths: what several teachers take is not planned" in capsys.readouterr().err
