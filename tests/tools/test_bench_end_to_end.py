"""The bench beside TRL: our side with a stand-in for TRL's, what the two say to each other, and the table."""

import io
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from tests.data.tiny_tokenizer import write_prompts
from tests.training.test_job import save_job_models
from tools.bench import end_to_end
from tools.bench.end_to_end import Run, print_figures
from tools.bench.turns import Peer, Step

GIB = 2**30
STAND_IN = f"""#!{sys.executable}
import json, shutil, sys
from pathlib import Path
from tools.bench.turns import Turns

turns, settings = Turns(), json.loads(Path(sys.argv[3]).read_text())
lines = [json.loads(line) for line in Path(settings["prompts"]).read_text().splitlines()]
turns.say({{}})
size = settings["trainer"]["per_device_train_batch_size"]
for step in range(settings["trainer"]["max_steps"]):
    turns.wait()
    prompts = [line["prompt"][0]["content"] for line in lines[size * step : size * (step + 1)]]
    turns.took(sum(3 + len(prompt.split()) for prompt in prompts), 8 * size)
shutil.copytree(settings["student"], settings["export"])
turns.say({{}})
"""


def table_cells(printed: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in rows}


def small_run(folder: Path) -> tuple[int, str]:
    values = {
        "student.path": folder / "student",
        "teacher.path": folder / "teacher",
        "data.prompts": folder / "prompts.jsonl",
        "data.max_prompt_tokens": 32,
        "evaluation.prompts": folder / "prompts.jsonl",
        "rollout.prompts_per_step": 4,
        "rollout.max_new_tokens": 8,
        "optimizer.lr": 1e-2,
    }
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(end_to_end, "TRL", folder / "trl")
        patch.setattr(end_to_end, "prepare", lambda console: None)
        patch.setenv("PYTHONPATH", str(Path(end_to_end.__file__).parents[2]))
        overrides = [f"{key}={value}" for key, value in values.items()]
        code = end_to_end.main(["--precision", "fp32", "--steps", "3", *overrides])
    return code, printed.getvalue()


def test_small_run(gloo, tmp_path):
    save_job_models(tmp_path, layers=8)
    write_prompts(tmp_path / "prompts.jsonl", 12)
    (tmp_path / "trl").write_text(STAND_IN)
    (tmp_path / "trl").chmod(0o755)
    code, printed = gloo(1, small_run, tmp_path)[0]
    assert code == 0
    assert "fp32, 4 × 8 tokens a step, 3 steps" in printed
    cells = table_cells(printed)
    assert list(cells) == ["ours", "TRL"]
    assert all(float(cell) > 0 for cell in cells["ours"])
    (*_, before, after), (*_, untrained_before, untrained_after) = cells["ours"], cells["TRL"]
    assert before == untrained_before == untrained_after, "the stand-in has saved the student as it was"
    assert float(after) < float(before)


def test_a_missing_environment_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(end_to_end, "TRL", tmp_path / "python")
    assert end_to_end.main([]) == 2
    assert (
        capsys.readouterr().err == f"error: {tmp_path}/python is not there: run `make .venv-trl/.installed`\n"
    )


def test_the_first_step_does_not_count_and_the_ratio_is_that_of_rounds(capsys):
    def steps(*seconds: float) -> list[Step]:
        return [Step(each, each / 2, 100, 500, (number + 1) * GIB) for number, each in enumerate(seconds)]

    runs = {
        "ours": Run(steps(99.0, 2.0, 5.0, 2.5), 1.25),
        "TRL": Run(steps(1.0, 4.0, 20.0, 5.0), 1.375),
    }
    print_figures("recorded", 2.5, runs)
    printed = capsys.readouterr().out
    assert table_cells(printed) == {
        "ours": ["2.50", "1.25", "200", "4.00", "2.500", "1.250"],
        "TRL": ["5.00", "2.50", "100", "4.00", "2.500", "1.375"],
    }
    assert "ours / TRL = 2.00" in printed and "TRL / ours = 2.00" in printed


def test_a_peer_that_ends_says_why(tmp_path):
    program = "import sys; sys.exit('it has no money')"
    peer = Peer([sys.executable, "-c", program], tmp_path / "log", {})
    with peer, pytest.raises(SystemExit, match="it has no money"):
        peer.ready()
