"""Tasks from files with the columns of the usual data sets, from reasoning-gym, and mistakes in them."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_opd.config.load import load_config
from megatron_opd.config.schema import Config
from megatron_opd.errors import UserError
from megatron_opd.evaluation.tasks import longest_sequence, read_tasks
from tests.data.tiny_tokenizer import make_tokenizer
from tests.test_train import inputs, write_config

__all__ = ["inputs"]

ROWS: dict[str, dict[str, Any]] = {
    "aime24": {"ID": "2024-I-1", "Problem": "one two", "Solution": "so 204", "Answer": 204},
    "aime25": {"problem_idx": 1, "problem": "one two", "answer": "204", "problem_type": ["Algebra"]},
    "hmmt": {
        "problem_idx": 1,
        "problem": "one two",
        "answer": r"\frac{204}{1}",
        "problem_type": ["Geometry"],
    },
    "math-500": {
        "problem": "one two",
        "solution": r"\boxed{204}",
        "answer": "204",
        "subject": "x",
        "level": 2,
    },
    "amc": {"id": 0, "problem": "one two", "answer": 204.0, "url": "x"},
    "amc23": {"id": 0, "question": "one two", "answer": "204.0"},
    "gsm8k": {"question": "one two", "answer": "2*102=204\n#### 204"},
    "dapo": {
        "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one two"}],
        "reward_model": {"ground_truth": "204", "style": "rule"},
    },
    "solutions": {"problem": "one two", "solution": r"Thus $\boxed{204}$."},
}


@pytest.fixture
def read(inputs, tmp_path):
    """The tasks of these sections, and the configuration."""

    def tasks(positions: int = 1000, **sections: dict[str, Any]):
        config = configured(inputs, tmp_path, sections)
        return read_tasks(config, make_tokenizer(), positions)

    return tasks


def configured(inputs: Path, folder: Path, sections: dict[str, Any]) -> Config:
    return load_config(write_config(inputs, folder / "run", evaluation__tasks=sections))


def jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ROWS)
def test_the_columns_of_the_usual_data_sets_are_found(name, read, tmp_path):
    (task,) = read(**{name: {"path": jsonl(tmp_path / "data.jsonl", ROWS[name], ROWS[name])}})
    assert [prompt.id for prompt in task.prompts] == [f"{name}/0", f"{name}/1"]
    assert [prompt.text for prompt in task.prompts] == ["one two"] * 2
    text = make_tokenizer().decode(task.prompts[0].token_ids)
    assert text.endswith("<user> one two <eos> <assistant>")
    assert text.startswith("<system> be brief") == (name == "dapo")
    assert task.expected[0] in ("204", "204.0", r"\frac{204}{1}")


def test_columns_template_and_limits_of_ones_own(read, tmp_path):
    rows = [{"q": "one", "problem": "no", "meta": {"a": i}} for i in range(3)]
    (task,) = read(
        mine={
            "path": jsonl(tmp_path / "data.jsonl", *rows),
            "prompt_column": "q",
            "answer_column": "meta.a",
            "template": "two {problem} three",
            "system_prompt": "be brief",
            "max_problems": 2,
            "k": 4,
            "temperature": 0.5,
        }
    )
    assert [prompt.text for prompt in task.prompts] == ["two one three"] * 2 and task.expected == ["0", "1"]
    assert make_tokenizer().decode(task.prompts[0].token_ids).startswith("<system> be brief")


def test_how_responses_are_drawn_is_the_tasks_or_else_the_rollouts(inputs, tmp_path):
    section = {
        "path": jsonl(tmp_path / "data.jsonl", ROWS["amc"]),
        "k": 4,
        "temperature": 0.5,
        "max_new_tokens": 20,
    }
    config = configured(inputs, tmp_path, {"a": section, "b": {"path": section["path"]}})
    own, plain = (
        task.sampling(config.rollout, stop_ids=(2,), seed=1)
        for task in read_tasks(config, make_tokenizer(), 100)
    )
    assert (own.n, own.temperature, own.max_new_tokens, own.top_p) == (4, 0.5, 20, 1.0)
    assert (plain.n, plain.temperature, plain.max_new_tokens) == (1, 1.0, config.rollout.max_new_tokens)
    assert own.seed == plain.seed != config.seed and not own.tells_cut
    tasks = read_tasks(config, make_tokenizer(), 100)
    assert longest_sequence(tasks, config.rollout) == 20 + len(tasks[0].prompts[0].token_ids)


def test_files_of_all_kinds_hold_the_same(read, tmp_path):
    rows = [{"problem": "one", "answer": str(i)} for i in range(4)]
    data = datasets.Dataset.from_list(rows)
    jsonl(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    data.to_parquet(str(tmp_path / "c.parquet"))
    data.to_csv(str(tmp_path / "d.csv"))
    data.save_to_disk(str(tmp_path / "e"))
    datasets.DatasetDict({"train": data.select([0]), "test": data}).save_to_disk(str(tmp_path / "f"))
    for part in ("train", "test"):
        (tmp_path / "g" / "data").mkdir(parents=True, exist_ok=True)
        data.to_parquet(str(tmp_path / "g" / "data" / f"{part}-00000-of-00001.parquet"))
    names = ("a.jsonl", "b.json", "c.parquet", "d.csv", "e", "f", "g")
    split = {"f": "test", "g": "test"}
    tasks = read(**{f"t{i}": {"path": str(tmp_path / n), "split": split.get(n)} for i, n in enumerate(names)})
    assert [task.expected for task in tasks] == [["0", "1", "2", "3"]] * len(names)
    for name, there in (("f", "train, test"), ("g", "test, train")):
        with pytest.raises(UserError, match=rf"tasks.t: .*has the splits {there}: name one"):
            read(t={"path": str(tmp_path / name)})
        with pytest.raises(UserError, match=r"has no split 'dev'|the split 'dev'"):
            read(t={"path": str(tmp_path / name), "split": "dev"})


def test_problems_of_reasoning_gym(read):
    (task,) = read(sums={"reasoning_gym": "chain_sum", "size": 2, "seed": 3, "options": {"max_terms": 3}})
    assert len(task.prompts) == len(task.expected) == 2 and task.numbers
    assert task.generator == {"name": "chain_sum", "size": 2, "seed": 3, "options": {"max_terms": 3}}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "evaluation.tasks.x: give either path"),
        ({"path": "data.jsonl", "reasoning_gym": "chain_sum"}, "give either path"),
        ({"path": "data.jsonl", "size": 5}, "x.size: only tasks with reasoning_gym read it"),
        ({"reasoning_gym": "chain_sum", "split": "test"}, "x.split: only tasks with path read it"),
        ({"path": "data.jsonl", "template": "solve"}, "has to hold {problem}"),
        ({"path": "data.jsonl", "k": 2, "temperature": 0.0}, "x.k: at temperature 0 all 2 responses"),
        (
            {"path": "data.jsonl", "kk": 2},
            "unknown key 'evaluation.tasks.x.kk' in .*: did you mean 'evaluation.tasks.x.k",
        ),
        ({"path": "data.jsonl", "k": "2"}, "evaluation.tasks.x.k: expected a whole number"),
        (3, "evaluation.tasks.x: expected a section with the keys path, split"),
    ],
)
def test_mistakes_in_a_section(section, message, inputs, tmp_path):
    from megatron_opd.config.checks import check_fields

    with pytest.raises(UserError, match=message):
        check_fields(configured(inputs, tmp_path, {"x": section}))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "one", "answer": "1"}], r"no column for the problem \(problem, .*there are text, answer"),
        ([{"problem": "one"}], "no column for the answer"),
        ([{"problem": "one", "answer": "1"}, {"problem": "one", "answer": None}], "row 2: answer is neither"),
        ([{"problem": 3, "answer": "1"}], "row 1: problem is neither text nor chat"),
        ([{"problem": "one " * 990, "answer": "1"}], "max_new_tokens: its longest prompt has 993 tokens"),
        ([3], "line 1: not an object"),
        ([], "holds no problems"),
    ],
)
def test_mistakes_in_a_file(rows, message, read, tmp_path):
    with pytest.raises(UserError, match=rf"evaluation.tasks.x.*{message}"):
        read(x={"path": jsonl(tmp_path / "data.jsonl", *rows)})


def test_overrides_reach_a_task(inputs, tmp_path):
    path = write_config(inputs, tmp_path / "run", evaluation__tasks={"x": {"path": "data.jsonl"}})
    config = load_config(path, ["evaluation.tasks.x.k=8", "evaluation.tasks.y.reasoning_gym=chain_sum"])
    assert config.evaluation.tasks["x"].k == 8 and config.evaluation.tasks["y"].reasoning_gym == "chain_sum"
