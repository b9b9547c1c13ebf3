"""The two tasks of the studies, with worked steps, as tokens: chain sums and sorting, both of reasoning-gym.

A chain sum is worked from the left, one operation at a time, and what is left is written out again:
`7+5-3+8=12-3+8=9+8=17<answer>17</answer>`. One wrong digit early makes all that follows wrong, which is what a study
of positions needs. Sorting is written down in order: `ascending45,3,77=3,45,77<answer>3,45,77</answer>`.

Numbers of up to two digits are one token each. `<answer>` has a second spelling, in three tokens, for the study of
tokenizers that differ.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import reasoning_gym
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from megatron_opd.data.rollouts import write_objects

SPECIAL = ("<pad>", "<eos>", "<unk>")
SYMBOLS = ("+", "-", "=", ",", "ascending", "descending", "<answer>", "</answer>", "<", "answer", ">")
SPELT_OUT = ("<", "answer", ">")
VOCABULARY = (*SPECIAL, *SYMBOLS, *(str(number) for number in range(100)))
IDS = {token: index for index, token in enumerate(VOCABULARY)}
_TOKEN = re.compile(r"<answer>|</answer>|answer|ascending|descending|[1-9]\d|\d|[-+=,<>]")


@dataclass(frozen=True)
class Problem:
    """A problem, the worked response to it and the answer, as text."""

    prompt: str
    worked: str
    answer: str

    @property
    def response(self) -> str:
        """What a model is taught to write, without the end token."""
        return f"{self.worked}<answer>{self.answer}</answer>"


def chain_sums(count: int, seed: int, *, terms: int) -> list[Problem]:
    """Sums and differences of `terms` numbers of one digit."""
    made = reasoning_gym.create_dataset(
        "chain_sum", size=count, seed=seed, min_terms=terms, max_terms=terms, min_digits=1, max_digits=1
    )
    problems = []
    for item in made:
        first, *rest = re.findall(r"(?:^|[-+])\d+", item["metadata"]["expression"].replace(" ", ""))
        total, lines = int(first), []
        for done, term in enumerate(rest, start=1):
            total += int(term)
            lines.append(str(total) + "".join(rest[done:]))
        assert str(total) == item["answer"], "the worked sum is that of reasoning-gym"
        problems.append(Problem("".join([first, *rest, "="]), "=".join(lines), item["answer"]))
    return problems


def sortings(count: int, seed: int, *, numbers: int) -> list[Problem]:
    """Lists of `numbers` numbers of up to two digits, to be put in ascending or descending order."""
    made = reasoning_gym.create_dataset(
        "number_sorting", size=count, seed=seed, min_numbers=numbers, max_numbers=numbers, min_decimals=0,
        max_decimals=0, min_value=0, max_value=99,
    )  # fmt: skip
    problems = []
    for item in made:
        facts = item["metadata"]
        given, ordered = (
            ",".join(str(int(float(number))) for number in facts[f"{which}_numbers"])
            for which in ("original", "sorted")
        )
        problems.append(Problem(f"{facts['direction']}{given}=", ordered, ordered))
    return problems


def encode(text: str, *, spelt_out: bool = False) -> list[int]:
    """Ids of a text of the tasks; `spelt_out`: with `<answer>` in three tokens."""
    tokens = _TOKEN.findall(text)
    assert "".join(tokens) == text, text
    return [IDS[part] for t in tokens for part in (SPELT_OUT if spelt_out and t == "<answer>" else (t,))]


def decode(ids: Sequence[int]) -> str:
    """The text of ids up to the end token."""
    tokens = [VOCABULARY[index] for index in ids]
    return "".join(tokens[: tokens.index("<eos>")] if "<eos>" in tokens else tokens)


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of all models here; its chat template is the message alone."""
    made = Tokenizer(WordLevel(IDS, unk_token="<unk>"))
    made.pre_tokenizer = Split(Regex(_TOKEN.pattern), behavior="isolated")
    made.decoder = decoders.Fuse()
    whole = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    whole.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return whole


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """A JSONL file for `data.prompts` and for a task of `evaluation.tasks`."""
    write_objects(path, ({"prompt": each.prompt, "answer": each.answer} for each in problems))


Maker = partial[list[Problem]]
"""(number of problems, seed) -> problems."""
