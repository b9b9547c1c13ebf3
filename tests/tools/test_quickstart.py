"""The quickstart's orchestration on a tiny model: what is there is used again, what is half done is done again."""

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from megatron_opd.config.load import load_config, save_resolved
from megatron_opd.errors import UserError
from tests.data.tiny_tokenizer import save_tokenizer
from tests.tiny import save_tiny_model
from tools import quickstart, quickstart_data, smollm2


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Runs in an empty folder with a tiny teacher; the list of expensive steps that were taken."""
    config = quickstart.CONFIG.resolve()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "CONFIG", config)
    taken: list[str] = []

    def write_model(folder):
        taken.append("teacher")
        save_tiny_model(folder, family="llama", layers=30)
        save_tokenizer(folder)

    def write_prompts(folder):
        taken.append("prompts")
        folder.mkdir(parents=True)

    def convert(source, target):
        taken.append(f"convert {source.name}")
        target.mkdir()

    monkeypatch.setattr(smollm2, "write_smollm2", write_model)
    monkeypatch.setattr(quickstart_data, "write_prompts", write_prompts)
    monkeypatch.setattr("megatron_opd.checkpoint.convert.hf_to_megatron", convert)
    monkeypatch.setattr(quickstart, "ANSWER_TOKENS", 4)
    return taken


def write_run(config, rows, *, exported):
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if exported:
        save_resolved(config, config.run_dir)
        checkpoint = config.run_dir / "checkpoints" / "latest"
        checkpoint.mkdir(parents=True)
        (checkpoint / "run.json").write_text(json.dumps({"step": config.training.steps}))
        save_tiny_model(config.run_dir / "hf", family="llama", layers=2)
        save_tokenizer(config.run_dir / "hf")


def test_the_example_configuration_is_valid_and_names_what_is_prepared():
    config = load_config(quickstart.CONFIG, [])
    assert config.teacher.path == quickstart.megatron_folder(quickstart.TEACHER_HF)
    assert config.student.path == quickstart.megatron_folder(quickstart.STUDENT_HF)
    assert config.data.prompts.parent == quickstart.PROMPTS
    assert config.evaluation.prompts == quickstart.PROMPTS / "heldout.jsonl"


def test_everything_is_prepared_once(calls):
    console = Console(file=io.StringIO())
    quickstart.prepare(console)
    assert calls == ["prompts", "teacher", "convert smollm2-135m-instruct", "convert smollm2-24-layers"]
    assert json.loads((quickstart.STUDENT_HF / "config.json").read_text())["num_hidden_layers"] == 24
    quickstart.prepare(console)
    assert len(calls) == 4


def test_an_interrupted_step_is_done_again(calls, monkeypatch):
    console = Console(file=io.StringIO())
    with monkeypatch.context() as patch:
        patch.setattr(quickstart.prune_layers.SafetensorsFiles, "write", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quickstart.prepare(console)
    assert not quickstart.STUDENT_HF.exists()
    quickstart.prepare(console)
    assert quickstart.STUDENT_HF.is_dir()
    assert calls.count("teacher") == 1


def test_a_run_is_finished_when_its_last_step_is_saved_and_then_exported(calls):
    config = load_config(quickstart.CONFIG, [])
    assert not quickstart.finished(config)
    write_run(config, [{"step": 0, "eval/reverse_kl": 2.0}], exported=True)
    assert quickstart.finished(config)
    assert not quickstart.finished(load_config(quickstart.CONFIG, ["optimizer.lr=1e-6"])), "other settings"
    checkpoint = config.run_dir / "checkpoints" / "latest" / "run.json"
    checkpoint.write_text(json.dumps({"step": 3}))
    assert not quickstart.finished(config)
    checkpoint.write_text(json.dumps({"step": config.training.steps}))
    os.utime(config.run_dir / "hf" / "config.json", (0, 0))
    assert not quickstart.finished(config), "the export is older than the checkpoint"


def test_a_finished_run_is_not_trained_again_but_summarised(calls, monkeypatch, capsys):
    config = load_config(quickstart.CONFIG, [])
    rows = [{"step": 0, "eval/reverse_kl": 2.0}, {"step": config.training.steps, "eval/reverse_kl": 0.5}]
    write_run(config, rows, exported=True)
    monkeypatch.setattr(quickstart.subprocess, "run", lambda *a, **k: pytest.fail("trained again"))
    assert quickstart.main([]) == 0
    shown = capsys.readouterr().out
    assert "finished already; to start afresh: rm -r runs/quickstart" in shown
    assert f"2.00 before, 0.50 after {config.training.steps} steps" in shown
    assert all(who in shown for who in ("student before", "student after", "teacher"))
    for where in ("checkpoints/latest", "hf", "metrics.jsonl", "curve.png", "report.html", "tensorboard"):
        assert f"runs/quickstart/{where}" in shown


def test_a_failed_training_passes_its_exit_code_on(calls, monkeypatch):
    commands = []

    def run(command, check):
        commands.append(command)
        return subprocess.CompletedProcess(command, returncode=7)

    monkeypatch.setattr(quickstart.subprocess, "run", run)
    assert quickstart.main(["training.steps=3"]) == 7
    assert commands[0][-3:] == ["--", str(quickstart.CONFIG), "training.steps=3"]


def test_another_configuration_is_trained_on_the_same_inputs(calls, monkeypatch, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(quickstart.CONFIG.read_text().replace("runs/quickstart", "runs/other"))
    commands = []

    def run(command, check):
        commands.append(command)
        return subprocess.CompletedProcess(command, returncode=7)

    monkeypatch.setattr(quickstart.subprocess, "run", run)
    assert quickstart.main([str(other), "seed=3"]) == 7
    assert commands[0][-3:] == ["--", str(other), "seed=3"] and quickstart.STUDENT_HF.is_dir()


def test_bad_input_is_one_line(calls, monkeypatch, capsys):
    def broken(folder):
        raise UserError("the package is not installed")

    monkeypatch.setattr(smollm2, "write_smollm2", broken)
    assert quickstart.main([]) == 2
    assert capsys.readouterr().err == "error: the package is not installed\n"


def test_it_starts_without_what_megatron_core_says_on_import() -> None:
    program = "import sys, tools.quickstart; sys.exit('megatron.core' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
