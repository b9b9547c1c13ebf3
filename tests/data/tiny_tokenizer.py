"""A word-level tokenizer made on the spot."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "be", "brief")
SPECIAL = ("<unk>", "<bos>", "<eos>", "<user>", "<system>", "<assistant>")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(
    *,
    words: Sequence[str] = WORDS,
    template: str | None = TEMPLATE,
    special: Sequence[str] = SPECIAL,
    eos: str = "<eos>",
) -> PreTrainedTokenizerFast:
    """Ids follow the order of SPECIAL and `words`; `special` are the tokens declared special."""
    vocab = {word: i for i, word in enumerate((*SPECIAL, *words))}
    model = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token=eos,
        additional_special_tokens=[token for token in special if token not in ("<unk>", "<bos>", eos)],
    )
    tokenizer.chat_template = template
    return tokenizer


def save_tokenizer(folder: Path, **options) -> Path:
    """Write `make_tokenizer(**options)` into a folder."""
    make_tokenizer(**options).save_pretrained(folder)
    return folder


def write_prompts(path: Path, count: int) -> None:
    """A JSONL file of prompts of 3 to 7 words, the first 40 all different."""
    prompts = (" ".join(WORDS[(i * k) % 8] for k in range(1, 4 + i % 5)) for i in range(count))
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
