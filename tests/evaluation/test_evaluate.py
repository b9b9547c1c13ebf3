"""Whole evaluations of a tiny model: the same in every layout, while training and by the command, and served."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opd.config.load import load_config
from megatron_opd.data.tokenizer import load_tokenizer, stop_ids
from megatron_opd.errors import UserError
from megatron_opd.evaluation.evaluate import as_json
from megatron_opd.evaluation.standalone import EvaluatedTexts, check_evaluation, load, scores_on_rank_0
from megatron_opd.evaluation.tasks import read_tasks
from megatron_opd.parallel import cpu
from megatron_opd.report.step_lines import read_steps
from tests.data.tiny_tokenizer import save_tokenizer
from tests.forked import run_forked
from tests.sglang_server import SGLangServer
from tests.test_train import write_config
from tests.tiny import VOCAB, save_tiny_model

DIGITS = [str(digit) for digit in range(10)]
K, LONGEST = 4, 24


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Models that write digits half of the time, prompts, and a task whose answers they hit now and then."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, seed in (("student", 1), ("teacher", 2)):
        save_tiny_model(folder / name, seed=seed, vocab=20)
        save_tokenizer(folder / name, words=DIGITS)
    texts = [f"{i % 10} {i * i % 10}" for i in range(12)]
    for name in ("train", "heldout"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    rows = ({"problem": text, "answer": i % 10} for i, text in enumerate(texts))
    (folder / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(inputs: Path, run_dir: Path, **changes: Any) -> Path:
    task = {
        "path": str(inputs / "digits.jsonl"),
        "k": K,
        "max_new_tokens": LONGEST,
        "temperature": 3.0,
    }
    return write_config(inputs, run_dir, **{"evaluation__tasks": {"digits": task}, **changes})


def samples_in(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.glob("*.jsonl")
    }


def evaluate_here(config_file: Path, overrides: list[str], model: Path, output: Path) -> dict[str, Any]:
    """On one rank of those that there are."""
    cpu.install()
    config = load_config(config_file, overrides)
    arch, layout = check_evaluation(config, model, torch.distributed.get_world_size())
    tokenizer = load_tokenizer(model)
    tasks = read_tasks(config, tokenizer, arch.max_positions)
    texts = EvaluatedTexts(tokenizer, arch.vocab_size, stop_ids(model, tokenizer), tasks)
    evaluated = load(config, model, output, arch, layout, texts, torch.device("cpu"))
    return as_json(scores_on_rank_0(evaluated, lambda line: None))


@pytest.fixture(scope="module")
def alone(inputs, gloo, tmp_path_factory):
    """The scores, and the folder of the samples, that one process comes to."""
    folder = tmp_path_factory.mktemp("alone")
    config = config_of(inputs, folder / "run")
    return gloo(1, evaluate_here, config, [], inputs / "student", folder)[0], folder


@pytest.mark.parametrize("layout", ["data", "tensor", "pipeline"])
def test_all_layouts_draw_the_same_samples_and_come_to_the_same_scores(layout, alone, gloo, inputs, tmp_path):
    config = config_of(inputs, tmp_path / "run")
    first, second = gloo(2, evaluate_here, config, [f"parallel.{layout}=2"], inputs / "student", tmp_path)
    scores, folder = alone
    assert scores == first and second == {}
    samples = samples_in(folder)
    assert samples == samples_in(tmp_path)
    assert len(samples["digits"]) == 12 * K
    assert 0 < sum(sample["right"] for sample in samples["digits"]) < 12 * K
    check_samples(samples["digits"], scores["digits"])


def check_samples(samples: list[dict[str, Any]], scores: dict[str, Any]) -> None:
    """The scores are those of the samples."""
    found = {name: estimate["mean"] for name, estimate in scores["metrics"].items()}
    right = [sum(sample["right"] for sample in samples[i : i + K]) for i in range(0, len(samples), K)]
    assert set(found) == {f"avg@{K}", "pass@2", f"pass@{K}", f"maj@{K}"}
    assert found[f"avg@{K}"] == pytest.approx(sum(right) / len(samples))
    assert found[f"pass@{K}"] == pytest.approx(sum(count > 0 for count in right) / len(right))
    cut = sum(sample["finish_reason"] == "length" for sample in samples)
    assert scores["truncated"] == pytest.approx(cut / len(samples))
    assert scores["tokens"] == pytest.approx(sum(sample["tokens"] for sample in samples) / len(samples))
    for sample in samples:
        assert sample["right"] == (sample["answer"] is not None and sample["answer"] == sample["expected"])
        assert "<" not in sample["response"] and sample["tokens"] <= LONGEST


def test_a_run_evaluates_and_the_command_finds_the_same_of_its_checkpoint(inputs, tmp_path):
    run_dir = tmp_path / "run"
    config = config_of(inputs, run_dir, training__steps=2, evaluation__every=1)
    sums = ("reasoning_gym=chain_sum", "size=3", "options.max_terms=2", "max_new_tokens=4")
    trained = run_forked("train", config, *(f"evaluation.tasks.sums.{setting}" for setting in sums))
    assert trained.returncode == 0, trained.stderr
    assert "step 0: digits avg@4 " in trained.stdout and "step 2: sums avg@1 " in trained.stdout
    rows = read_steps(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if f"eval/digits/avg@{K}" in row] == [0, 1, 2]
    assert all("eval/reverse_kl" in row for row in rows)
    again = run_forked("evaluate", config)
    assert again.returncode == 0, again.stderr
    assert "avg@4" in again.stdout and "results.json" in again.stdout
    folder = run_dir / "evaluate" / "step_00000002"
    drawn = samples_in(run_dir / "evaluation" / "step_00000002")
    assert samples_in(folder) == {"digits": drawn["digits"]} and len(drawn["sums"]) == 3
    found = json.loads((folder / "results.json").read_text())
    assert found["model"].endswith("checkpoints/step_00000002")
    for name, estimate in found["tasks"]["digits"]["metrics"].items():
        assert estimate["mean"] == rows[-1][f"eval/digits/{name}"]
        assert estimate["low"] == rows[-1][f"eval/digits/{name}_low"]
    assert found["tasks"]["digits"]["tokens"] == rows[-1]["eval/digits/tokens"]
    check_samples(samples_in(folder)["digits"], found["tasks"]["digits"])


def test_the_command_starts_the_processes_of_a_layout(inputs, tmp_path):
    config = config_of(inputs, tmp_path / "run", parallel__data=2)
    options = ("--model", inputs / "student", "--output", tmp_path / "out", "--json")
    done = run_forked("evaluate", *options, config)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "results.json").read_text())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "has no checkpoint yet: name a model folder with --model"),
        (["--model", "nowhere"], "--model: nowhere is no folder"),
        (["--model", "{inputs}/student", "parallel.tensor=3"], "parallel.tensor"),
        (["--model", "{inputs}/student", "evaluation.tasks.digits.path=no.jsonl"], "no.jsonl does not exist"),
    ],
)
def test_mistakes_are_one_line(words, message, inputs, tmp_path):
    config = config_of(inputs, tmp_path / "run")
    done = run_forked("evaluate", config, *(word.format(inputs=inputs) for word in words))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_an_evaluation_that_is_stuck_ends(inputs, tmp_path):
    words = ("evaluation.tasks.digits.k=9999", "rollout.max_batch=1", "timeouts.evaluation=1")
    done = run_forked("evaluate", config_of(inputs, tmp_path / "run"), *words, "--model", inputs / "student")
    assert done.returncode == 1
    assert re.match(r"error: rank 0 has been in evaluation for \d+ s", done.stderr.splitlines()[-1])
    assert "generate" in next((tmp_path / "run").rglob("rank_00000.txt")).read_text()


def test_a_run_without_tasks_has_nothing_to_evaluate(inputs, tmp_path):
    config = load_config(write_config(inputs, tmp_path / "run"))
    with pytest.raises(UserError, match=r"evaluation\.tasks: there are none"):
        check_evaluation(config, inputs / "student", 1)


def test_servers_draw_what_the_training_processes_draw(inputs, tmp_path, gloo, sglang: SGLangServer):
    """Greedily, token by token; and under top-p, which the server was not started to tell about."""
    model = tmp_path / "model"
    save_tiny_model(model, seed=3, tied=False, vocab=VOCAB)
    save_tokenizer(model, words=[str(number) for number in range(VOCAB - 6)])
    path = str(inputs / "digits.jsonl")
    greedy = {"path": path, "temperature": 0.0, "max_new_tokens": 6}
    cut = {"path": path, "top_p": 0.9, "k": 2, "max_new_tokens": 6}
    tasks = {"evaluation__tasks": {"greedy": greedy, "cut": cut}}
    served = {"engine": "sglang", "sglang": {"urls": [sglang.url], "concurrency": 8}}
    local = write_config(inputs, tmp_path / "run", **tasks)
    remote = write_config(
        inputs, tmp_path / "served", **tasks, **{f"rollout__{k}": v for k, v in served.items()}
    )
    (here,) = gloo(1, evaluate_here, local, [], model, tmp_path / "local")
    try:
        done = run_forked("evaluate", remote, "--model", model, "--output", tmp_path / "remote")
    finally:
        sglang.load(sglang.models[0], "0")
    assert done.returncode == 0, done.stderr
    there = json.loads((tmp_path / "remote" / "results.json").read_text())["tasks"]
    assert there["greedy"] == here["greedy"]
    assert samples_in(tmp_path / "remote")["greedy"] == samples_in(tmp_path / "local")["greedy"]
    assert len(samples_in(tmp_path / "remote")["cut"]) == 24
