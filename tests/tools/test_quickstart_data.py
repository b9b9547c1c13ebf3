"""The quickstart's prompts: disjoint, mixed, the same every time."""

import json
from collections import Counter

import pytest

from tools import quickstart_data


@pytest.fixture
def sources(tmp_path, monkeypatch):
    questions = [{"question": f"who wrote book {i}", "answer": ["x"]} for i in range(200)]
    questions += [{"question": "WHO wrote book 3?"}]  # the same question again
    problems = [
        {"passage": f"Ann has {i} apples. ", "question": "How many? ", "answer": "1"} for i in range(200)
    ]
    for name, rows in (("NQ-open/test.jsonl", questions), ("ASDiv/test.jsonl", problems)):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(
        quickstart_data,
        "package_file",
        lambda package, version, ending: tmp_path / ending.removeprefix("data/"),
    )


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_are_disjoint_mixed_and_complete(sources, tmp_path):
    assert quickstart_data.write_prompts(tmp_path / "out") == (
        400 - quickstart_data.HELDOUT,
        quickstart_data.HELDOUT,
    )
    train, heldout = (read(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "heldout"))
    prompts = [row["prompt"] for row in train + heldout]
    assert len(set(prompts)) == len(prompts) == 400
    assert "Who wrote book 7?" in prompts and "Ann has 7 apples. How many?" in prompts
    for rows in (train, heldout, train[:40]):
        counts = Counter(row["source"] for row in rows)
        assert min(counts["NQ-open"], counts["ASDiv"]) > len(rows) / 4


def test_the_same_every_time(sources, tmp_path):
    for name in ("a", "b"):
        quickstart_data.write_prompts(tmp_path / name)
    for file in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
