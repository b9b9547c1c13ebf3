"""The studies of the papers: their tasks, their settings, and each from end to end at its smallest size."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from examples.papers.aopd import __main__ as aopd
from examples.papers.iw_opd import __main__ as iw_opd
from examples.papers.pair import IGNORED, padded
from examples.papers.position_bias import __main__ as position_bias
from examples.papers.revisiting_opd import __main__ as revisiting_opd
from examples.papers.settings import FULL, SMOKE, TASKS, Study
from examples.papers.study import Mean
from examples.papers.tasks import IDS, SPELT_OUT, VOCABULARY, decode, encode, tokenizer
from megatron_opd.config.checks import check_fields
from megatron_opd.config.load import load_config

COMPARISONS: dict[str, Mapping[str, Mapping[str, Any]]] = {
    "position_bias": position_bias.VARIANTS,
    "iw_opd": iw_opd.VARIANTS,
    "supports": revisiting_opd.SUPPORTS,
    "spelling": revisiting_opd.SPELLINGS,
    "aopd": aopd.VARIANTS,
}


@pytest.mark.parametrize("task", TASKS)
def test_problems_are_worked_to_their_answer(task: str) -> None:
    for problem in TASKS[task](50, 7):
        assert decode(encode(problem.prompt + problem.response)) == problem.prompt + problem.response
        assert problem.worked.split("=")[-1] == problem.answer
        if task == "chain":
            lines = [problem.prompt.removesuffix("="), *problem.worked.split("=")]
            assert len({sum(map(int, re.findall(r"-?\d+", line))) for line in lines}) == 1
        else:
            given = re.findall(r"\d+", problem.prompt)
            rising = problem.prompt.startswith("ascending")
            assert problem.answer == ",".join(sorted(given, key=int, reverse=not rising))


def test_the_tokenizer_reads_and_writes_what_models_are_taught() -> None:
    problem = TASKS["chain"](1, 7)[0]
    text = problem.prompt + problem.response
    tokens = tokenizer()
    assert tokens(text)["input_ids"] == encode(text)
    assert tokens.apply_chat_template([{"role": "user", "content": text}], tokenize=False) == text
    spelt = encode(text, spelt_out=True)
    assert len(spelt) == len(encode(text)) + len(SPELT_OUT) - 1
    assert tokens.decode(spelt) == tokens.decode(encode(text)) == text


def test_only_responses_are_targets() -> None:
    problems = TASKS["chain"](3, 7)
    ids_BS, target_BS = padded(problems, spelt_out=False)
    for problem, ids, target in zip(problems, ids_BS.tolist(), target_BS.tolist(), strict=True):
        kept = [index for index in target if index != IGNORED]
        assert kept == [*encode(problem.response), IDS["<eos>"]]
        first = target.index(kept[0])
        assert ids[:first] == encode(problem.prompt) and ids[first : first + len(kept)] == kept


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_variant_is_a_configuration_of_its_own(name: str, tmp_path: Path) -> None:
    study = Study(replace(FULL, seeds=(1,)), tmp_path, tmp_path / "models", {}, Console())
    configs = []
    for run in study.runs("x", COMPARISONS[name], study.base("student")):
        loaded = load_config(run.prepare().arguments[1])
        check_fields(loaded)
        configs.append(loaded.model_dump_json(exclude={"run_dir"}))
    assert len(set(configs)) == len(configs) == len(COMPARISONS[name])


def test_means_over_seeds() -> None:
    mean = Mean.of([1.0, 2.0, 6.0])
    assert mean.mean == 3.0 and mean.error == pytest.approx(math.sqrt(7.0 / 3)) and mean.n == 3
    assert mean.shown(1) == "3.0 ± 1.5" and Mean.of([0.25]).shown(0, percent=True) == "25 ± nan"


@pytest.mark.parametrize(
    "names",
    [
        ("position_bias",),
        pytest.param(("iw_opd", "revisiting_opd", "aopd"), marks=pytest.mark.full),
    ],
)
def test_studies_run_and_go_on_where_they_were(names: tuple[str, ...], tmp_path: Path) -> None:
    """One after the other, for they share the models."""
    for name in names:
        command = [sys.executable, "-m", f"examples.papers.{name}", "--smoke", "--folder", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "smoke" / name
        results = json.loads((folder / "results.json").read_text())
        assert set(results["models"]) == {stage for each in SMOKE.recipe.learners for stage in each.stages}
        assert (folder / "figure.png").stat().st_size > 10_000
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "runs " not in again.stdout, again.stderr
    assert json.loads((folder / "results.json").read_text()) == results


def test_the_toy_study_of_the_discount(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.papers.revisiting_opd.discount", "--smoke"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "smoke" / "discount" / "discount.json").read_text())
    assert list(results) == ["0.0", "0.25", "0.5", "0.75", "1.0"]
    assert all(
        len(run["variance"]) == 2 and len(run["distance"]) == 2 for runs in results.values() for run in runs
    )
    assert results["1.0"][0]["variance"][0] > results["0.0"][0]["variance"][0]


def test_a_vocabulary_without_repeats() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY) == len(tokenizer())
