"""The command line: exit codes, one line for every mistake, quick help, and what reaches the training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.filesize import decimal

from megatron_opd.checkpoint.convert import plan_hf_to_megatron
from megatron_opd.cli import main
from megatron_opd.errors import Outage, UserError
from megatron_opd.launch import doctor
from megatron_opd.launch.worker import EXIT_FILE
from tests.checkpoint.models import write_hf

ROOT = Path(__file__).parents[1]
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line in this process: exit code, stdout, stderr."""
    for name in ("RANK", "TORCHELASTIC_ERROR_FILE", "MEGATRON_OPD_LAUNCHER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        return (caught.value.code or 0, *capfd.readouterr())  # type: ignore[return-value]

    return command


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A configuration whose models and prompts are there as far as can be seen before a process starts."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    config = {
        "run_dir": str(tmp_path / "run"),
        "student": {"path": str(tmp_path / "model")},
        "teacher": {"path": str(tmp_path / "model")},
        "data": {"prompts": str(tmp_path / "prompts.jsonl"), "max_prompt_tokens": 64},
        "rollout": {"max_new_tokens": 64},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands for the training loop: collects the configurations that it is called with."""
    calls: list[Any] = []
    module = types.ModuleType("megatron_opd.train")
    module.train = lambda config: calls.append(config) or True  # type: ignore[attr-defined,func-returns-value]
    monkeypatch.setitem(sys.modules, "megatron_opd.train", module)
    return calls


def assert_one_error(result: tuple[int, str, str], expected: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert expected in err


def test_train_passes_the_configuration_on(run: Run, config_file: Path, trained: list[Any]) -> None:
    assert run("train", config_file, "optimizer.lr=2e-5", "seed=3") == (0, "", "")
    assert [(config.optimizer.lr, config.seed) for config in trained] == [(2e-5, 3)]


def test_train_is_one_rank_where_something_else_started_it(
    run: Run, config_file: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_one_error(
        run("train", config_file, "parallel.tensor=2"), "needs 2 processes and this is one: use `megatron"
    )
    assert not trained
    monkeypatch.setenv("RANK", "1")
    assert run("train", config_file, "parallel.tensor=2") == (0, "", "")
    assert len(trained) == 1


def test_a_mistake_inside_the_training_is_one_line(
    run: Run, config_file: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> None:
        raise UserError("no space left on device: free some\nand start again")

    monkeypatch.setattr(sys.modules["megatron_opd.train"], "train", fail)
    assert_one_error(run("train", config_file), "error: no space left on device: free some and start again")
    monkeypatch.setenv("RANK", "3")
    assert_one_error(run("train", config_file), "error: rank 3: no space left")


@pytest.mark.parametrize(("kind", "code"), [(UserError, 2), (Outage, 1)])
def test_a_batch_script_learns_whether_to_start_again(
    kind: type[UserError],
    code: int,
    run: Run,
    config_file: Path,
    trained: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: Any) -> None:
        raise kind("none of 2 servers has worked")

    monkeypatch.setattr(sys.modules["megatron_opd.train"], "train", fail)
    monkeypatch.setenv(EXIT_FILE, str(config_file.with_name("exit")))
    assert run("train", config_file) == (code, "", "error: none of 2 servers has worked\n")
    assert config_file.with_name("exit").read_text() == f"{code}\n"


def test_ctrl_c_ends_with_130(
    run: Run, config_file: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["megatron_opd.train"], "train", interrupt)
    code, _, err = run("train", config_file)
    assert code == 130 and "Traceback" not in err


@pytest.mark.parametrize("command", [["train"], ["launch", "local"]])
def test_a_mistake_in_the_configuration_is_one_line(run: Run, config_file: Path, command: list[str]) -> None:
    absent = "/a/rather/long/path/" + "to/" * 60 + "nothing.yaml"
    assert_one_error(run(*command, absent), absent)
    assert_one_error(run(*command, config_file, "optimizer.lrr=3"), "did you mean 'optimizer.lr'?")
    assert_one_error(
        run(*command, config_file, "optimizer.lr=fast"), "optimizer.lr: expected a number, got 'fast'"
    )
    assert_one_error(run(*command, config_file, "optimizer.lr"), "expected key=value")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["student.path=/nowhere"], "/nowhere"),
        (["data.prompts=/nowhere.jsonl"], "data.prompts: /nowhere.jsonl does not exist"),
        (["evaluation.prompts=/nowhere.jsonl"], "evaluation.prompts: /nowhere.jsonl does not exist"),
        (["parallel.tensor=4"], "parallel.tensor: 4 does not divide the 2 key-value heads"),
        (["parallel.pipeline=3"], "parallel.pipeline: 3 does not divide the 4 layers"),
        (["parallel.data=2", "--nproc", "3"], "but 3 processes run"),
        (["rollout.max_new_tokens=500"], "the student has 512 positions"),
        (
            ["objective.preset=lsm", "objective.k=1"],
            "objective.k: 1 with remainder renormalize has zero loss",
        ),
        (["objective.beta=0.3"], "objective.beta: 0.3 is read with divergence jsd only"),
        (
            ["objective.preset=exopd"],
            "reference: objective.shaping.reference_weight = 1.25 needs a reference",
        ),
        (["objective.preset=exopd", "reference.path=/nowhere"], "reference.path: "),
    ],
)
def test_launch_checks_before_it_starts_processes(
    run: Run, config_file: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    def start(*_: Any, **__: Any) -> None:
        pytest.fail("no process should be started")

    monkeypatch.setattr("megatron_opd.launch.local.run_workers", start)
    assert_one_error(run("launch", "local", config_file, *arguments), expected)


@pytest.mark.parametrize(
    ("arguments", "processes"),
    [
        ([], 1),
        (["parallel.tensor=2", "parallel.pipeline=2"], 4),
        (["parallel.data=2"], 2),
        (["--nproc", "4"], 4),
    ],
)
def test_launch_starts_what_the_layout_needs(
    run: Run, config_file: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], processes: int
) -> None:
    from megatron_opd.launch.local import Outcome

    started: list[tuple[list[str], int]] = []

    def start(command: list[str], number: int, *, if_killed: str) -> Outcome:
        started.append((command, number))
        return Outcome(1, f"rank 1 was killed by SIGKILL: {if_killed}")

    monkeypatch.setattr("megatron_opd.launch.local.run_workers", start)
    code, out, err = run("launch", "local", config_file, *arguments)
    assert (code, out) == (1, "")
    assert err == "error: rank 1 was killed by SIGKILL: start the same command again to resume\n"
    overrides = [argument for argument in arguments if "=" in argument]
    assert started == [(["-m", "megatron_opd.cli", "train", "--", str(config_file), *overrides], processes)]


def test_launch_hands_on_the_mistake_of_its_ranks(
    run: Run, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes: the ranks look for the file after the launcher has read it, and it is gone."""
    broken = tmp_path / "sitecustomize"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "import os, pathlib\nif 'RANK' in os.environ:\n"
        f"    pathlib.Path({str(config_file)!r}).unlink(missing_ok=True)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{broken}{os.pathsep}{ROOT}")
    assert_one_error(run("launch", "local", config_file, "parallel.data=2"), "cannot read the config file")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("frobnicate", "no such command 'frobnicate' (see megatron-opd --help)"),
        ("trian", "no such command 'trian'. Did you mean 'train'? (see megatron-opd --help)"),
        (
            "convert verifi",
            "no such command 'verifi'. Did you mean 'verify'? (see megatron-opd convert --help)",
        ),
        ("train", "missing argument 'CONFIG' (see megatron-opd train --help)"),
        ("train x --no-such-option", "no such option: --no-such-option (see megatron-opd train --help)"),
        ("train x --optimizer.lr=3", "no such option: --optimizer.lr (see megatron-opd train --help)"),
        (
            "launch local x --nproc 0",
            "invalid value for '--nproc': Input should be greater than or equal to 1 "
            "(see megatron-opd launch local --help)",
        ),
        (
            "launch local x --nprocs 2",
            "no such option: --nprocs; did you mean --nproc? (see megatron-opd launch",
        ),
        ("doctor now", "cannot read the config file now: No such file or directory"),
        (
            "convert hf-to-megatron a",
            "missing argument 'DST' (see megatron-opd convert hf-to-megatron --help)",
        ),
        (
            "convert megatron-to-hf a b --dryrun",
            "no such option: --dryrun; did you mean --dry-run? (see mega",
        ),
        ("convert gguf-to-hf a b --dtype fp64", "invalid value for '--dtype': 'fp64' is not one of 'bf16', "),
        ("convert verify a b --tokens", "option '--tokens' requires an argument (see megatron-opd --help)"),
        (
            "convert inspect a --chek",
            "no such option: --chek; did you mean --check? (see megatron-opd convert ins",
        ),
    ],
)
def test_a_misspelt_command_line_is_one_line(run: Run, arguments: str, expected: str) -> None:
    assert_one_error(run(*arguments.split()), f"error: {expected}")


@pytest.mark.parametrize("command", [[], ["convert"], ["launch"]])
def test_a_command_that_lacks_all_its_words_shows_its_help(run: Run, command: list[str]) -> None:
    code, out, err = run(*command)
    assert (code, err) == (2, "") and " ".join(["Usage: megatron-opd", *command]) in out


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("model") / "hf", "llama", tied=True)


def test_convert_there_and_back(run: Run, hf_folder: Path, tmp_path: Path) -> None:
    code, out, err = run("convert", "hf-to-megatron", hf_folder, tmp_path / "megatron")
    assert (code, out) == (0, "") and err.startswith("hf-to-megatron  ") and err.endswith("B/s\n")
    assert run("convert", "megatron-to-hf", tmp_path / "megatron", tmp_path / "back")[0] == 0
    assert (tmp_path / "back" / "model.safetensors").is_file()
    result = run("convert", "megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    assert_one_error(result, "back exists already: remove it or choose another output folder")


def test_convert_with_several_processes(run: Run, hf_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "megatron"
    code, _, err = run("convert", "hf-to-megatron", "--processes", "2", "--dtype", "bf16", hf_folder, out)
    assert code == 0 and len(list((out / "state").glob("*.distcp"))) == 2
    whole = decimal(sum(plan_hf_to_megatron(hf_folder, "bf16").sizes))
    assert err.startswith(f"hf-to-megatron, 2 processes  {whole} of {whole}  ") and err.count("\n") == 1


@pytest.mark.parametrize("extra", [["--dry-run"], ["--processes", "2"]])
def test_convert_finds_mistakes_before_it_starts_processes(
    run: Run, hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: list[str]
) -> None:
    def start(*_: Any, **__: Any) -> None:
        pytest.fail("no process should be started")

    monkeypatch.setattr("megatron_opd.launch.local.run_workers", start)
    command = ["convert", "hf-to-megatron", *extra]
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    assert_one_error(run(*command, tmp_path / "no", tmp_path / "out"), "model folder not found")
    assert_one_error(
        run(*command, hf_folder, tmp_path / "there"), "there exists already: remove it or choose"
    )
    assert_one_error(run(*command, hf_folder, tmp_path / "file" / "out"), f"{tmp_path / 'file'} is a file")
    back = ["convert", "megatron-to-hf", *extra]
    assert_one_error(run(*back, hf_folder, tmp_path / "out"), "is not a Megatron folder")
    full = types.SimpleNamespace(free=1000)
    monkeypatch.setattr("megatron_opd.checkpoint.folders.shutil.disk_usage", lambda _: full)
    assert_one_error(run(*command, hf_folder, tmp_path / "out"), "no space left on device (0.00 GB needed")
    assert {path.name for path in tmp_path.iterdir()} == {"there", "file"}


def test_a_killed_conversion_is_not_told_to_resume(
    run: Run, hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_opd.launch.local import Outcome

    def start(command: list[str], number: int, *, if_killed: str) -> Outcome:
        return Outcome(1, f"rank 1 was killed by SIGKILL: {if_killed}")

    monkeypatch.setattr("megatron_opd.launch.local.run_workers", start)
    code, _, err = run("convert", "hf-to-megatron", "--processes", "3", hf_folder, tmp_path / "out")
    assert code == 1 and "nothing was written; start again, with fewer --processes" in err
    assert "resume" not in err and err.count("\n") == 1


@pytest.mark.parametrize("extra", [[], ["--processes", "2"]])
def test_convert_dry_run_prints_the_plan_and_writes_nothing(
    run: Run, hf_folder: Path, tmp_path: Path, extra: list[str]
) -> None:
    code, out, err = run("convert", "hf-to-megatron", "--dry-run", *extra, hf_folder, tmp_path / "out")
    assert (code, err) == (0, "")
    assert "decoder.final_layernorm.weight" in out and "float32" in out and "model.norm.weight" in out
    assert "total: 38 Hugging Face tensors" in out
    assert not list(tmp_path.iterdir())
    (tmp_path / "config.json").write_text((hf_folder / "config.json").read_text())
    assert_one_error(run("convert", "hf-to-megatron", "--dry-run", tmp_path, "x"), "has no weights")


@pytest.mark.parametrize(
    "command", [[], ["train"], ["launch", "local"], ["convert", "hf-to-megatron"], ["doctor"], ["evaluate"]]
)
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\nfrom megatron_opd.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
        "    assert not {'torch', 'megatron', 'transformers', 'datasets', 'omegaconf'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: megatron-opd" in done.stdout


def test_doctor_finds_that_this_machine_can_train(run: Run) -> None:
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert "right on 2 processes" in out and "0.16.1" in out and "this machine can train" in out


def test_doctor_names_what_is_missing(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def found() -> list[doctor.Check]:
        return [doctor.Check("torch", "2.13"), doctor.Check("gloo", "-", doctor.MISSING, "install it")]

    assert doctor.report(lambda: iter(found())) == 1
    assert "cannot train here: gloo" in capfd.readouterr().out
