"""The tokens that two models are compared on: real text through the folder's own tokenizer and chat template."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_opd.data.tokenizer import fingerprint, load_tokenizer
from megatron_opd.errors import UserError

CONVERSATIONS = (
    (
        "Why does the moon always show us the same side?",
        "Because it turns once on its axis in the time that it takes to go round the Earth: about 27.3 days. The tides "
        "that the Earth raised in the young moon slowed its rotation until the two periods were equal.",
    ),
    (
        "A train leaves at 14:35 and arrives at 17:10. It covers 217 km. What is its average speed?",
        "The journey takes 2 h 35 min, which is 2.583 hours. 217 / 2.583 = 84.0, so the average speed is 84 km/h.",
    ),
    (
        "Write a Python function that returns the n-th Fibonacci number.",
        "def fibonacci(n: int) -> int:\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a",
    ),
    (
        "Traduis en français, puis en allemand : « The library opens at nine on weekdays. »",
        "« La bibliothèque ouvre à neuf heures en semaine. » — „Die Bibliothek öffnet wochentags um neun Uhr.“",
    ),
    (
        "用一句话解释什么是光合作用。",
        "光合作用是植物利用阳光，把二氧化碳和水变成养分并放出氧气的过程。",
    ),
)


@dataclass(frozen=True)
class SampleTokens:
    """Ids [T] of one sequence and where they come from; `tokenizer` is None for random ids."""

    ids: Tensor
    source: str
    tokenizer: PreTrainedTokenizerBase | None

    def describe(self) -> str:
        """How many tokens of what."""
        return f"{len(self.ids)} {self.source}"

    def describe_position(self, position: int) -> str:
        """The token there, in brackets; nothing for random ids."""
        return "" if self.tokenizer is None else f" ({self.tokenizer.decode([int(self.ids[position])])!r})"


def sample_tokens(
    first: Path, second: Path, text: Path | None, *, count: int, vocab_size: int
) -> SampleTokens:
    """`count` tokens, or as many as the file `text` has, by the first folder's tokenizer or else the second's.

    Without `text`, built-in conversations are taken, repeated as often as it takes, through the chat template (without
    one: as plain text). Random ids when neither folder holds a tokenizer.

    Raises UserError for tokenizers that differ, for a `text` that cannot be read or used, and for ids beyond
    `vocab_size`.
    """
    tokenizers = [load_tokenizer(folder) for folder in (first, second) if any(folder.glob("tokenizer*"))]
    if not tokenizers:
        if text is not None:
            raise UserError(
                f"neither {first} nor {second} holds a tokenizer: without one --text cannot be used"
            )
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab_size, (count,), generator=generator)
        return SampleTokens(ids, "random ids (neither folder holds a tokenizer)", None)
    tokenizer = tokenizers[0]
    if fingerprint(tokenizer).tokens != fingerprint(tokenizers[-1]).tokens:
        raise UserError(f"{first} and {second} have different tokenizers: their ids do not mean the same")
    if text is None:
        found, source = _conversations(tokenizer, first), "tokens of built-in conversations"
        found *= -(-count // len(found))
    else:
        found, source = tokenizer(_read(text), add_special_tokens=True).input_ids, f"tokens of {text}"
    if not found:
        raise UserError(f"{text} holds no text")
    if max(found) >= vocab_size:
        raise UserError(
            f"the tokenizer of {first} makes ids up to {max(found)}, the model has {vocab_size} tokens"
        )
    return SampleTokens(torch.tensor(found[:count]), source, tokenizer)


def _conversations(tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[int]:
    if not tokenizer.chat_template:
        return tokenizer("\n\n".join(part for pair in CONVERSATIONS for part in pair)).input_ids
    ids: list[int] = []
    for question, answer in CONVERSATIONS:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        try:
            rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except TemplateError as error:
            raise UserError(
                f"{folder}: the chat template fails ({error}); give --text FILE instead"
            ) from None
        ids += tokenizer(rendered, add_special_tokens=False).input_ids
    return ids


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{text} cannot be read as text ({error})") from None
