"""Prompts: loading, chat template, length limit, and a deterministic resumable order."""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from megatron_opd.config.self_distillation import template_fields
from megatron_opd.data.jsonl import read_rows
from megatron_opd.errors import UserError

Message = dict[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the rollout engine.

    `id` is the row of the file as loaded, and `row@epoch` as drawn from a `PromptStream`: unique per draw,
    the key of the sampling noise.
    """

    id: str
    token_ids: list[int]  # chat template applied
    text: str  # the user's text
    teacher_ids: list[int] = field(default_factory=list)  # what the teacher reads instead; empty: token_ids
    route: str = ""  # name of its teacher, where prompts are routed


@dataclass(frozen=True)
class TeacherPrompt:
    """Prompts of the teacher's own: `template` with fields of the prompt's line is the user's last message."""

    template: str
    max_tokens: int  # longer ones are dropped

    def messages(self, messages: list[Message], line: Mapping[str, Any], prompt_field: str) -> list[Message]:
        """What the teacher reads in the place of `messages`, which are those of a line."""
        filled = self.template.format_map({**line, prompt_field: _user_text(messages)})
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        return [
            {**message, "content": filled} if i == last else message for i, message in enumerate(messages)
        ]


@dataclass(frozen=True)
class LoadedPrompts:
    """Prompts in file order, with what was left out and anything worth saying once at start-up."""

    prompts: list[Prompt]
    dropped_long: int  # longer than max_prompt_tokens
    dropped_empty: int  # blank text
    notes: list[str]
    dropped_teacher: int = 0  # the teacher's is longer than its limit

    @property
    def digest(self) -> str:
        """SHA-256 of the prompts' token ids, in order; with that of the teacher's where they are its own."""
        digest = _digest([prompt.token_ids for prompt in self.prompts])
        if any(prompt.teacher_ids for prompt in self.prompts):
            digest += f", the teacher's {_digest([prompt.teacher_ids for prompt in self.prompts])}"
        return digest


def _digest(token_ids: list[list[int]]) -> str:
    return hashlib.sha256(repr(token_ids).encode()).hexdigest()


def load_prompts(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    field: str = "prompt",
    max_prompt_tokens: int,
    system_prompt: str | None = None,
    teacher: TeacherPrompt | None = None,
) -> LoadedPrompts:
    """Read, render and tokenise the prompts of a JSONL file or of a folder of JSONL files.

    `field` holds text or a list of chat messages. The tokenizer's chat template is applied with the
    generation prompt; `system_prompt` goes first unless a message list brings its own. A tokenizer without a
    chat template gets the plain text. Prompts of more than `max_prompt_tokens` tokens are dropped and
    counted, as those that are too long for the `teacher`, if it has its own. The id of a prompt is its row.

    Raises UserError for unreadable input (naming file and line), malformed messages, a chat template that
    refuses a prompt, and when nothing is left.
    """
    rendered = _rendered(path, tokenizer, field, system_prompt, teacher)
    prompts, dropped_long, dropped_empty, dropped_teacher = [], 0, 0, 0
    for row, (text, ids, theirs) in enumerate(rendered):
        if not text.strip() or not ids:
            dropped_empty += 1
        elif len(ids) > max_prompt_tokens:
            dropped_long += 1
        elif teacher and len(theirs) > teacher.max_tokens:
            dropped_teacher += 1
        else:
            prompts.append(Prompt(id=str(row), token_ids=ids, text=text, teacher_ids=theirs))
    if not prompts:
        shortest = min(len(ids) for _, ids, _ in rendered)
        raise UserError(
            f"{path}: no prompt is left: {dropped_long} exceed data.max_prompt_tokens = {max_prompt_tokens} "
            f"(the shortest of all has {shortest} tokens), {dropped_empty} are empty, the teacher's of "
            f"{dropped_teacher} exceed teacher.max_prompt_tokens"
        )
    notes = _notes(path, tokenizer, dropped_long, dropped_empty, dropped_teacher)
    return LoadedPrompts(prompts, dropped_long, dropped_empty, notes, dropped_teacher)


class PromptStream:
    """An endless, deterministic sequence of prompts that can be resumed.

    Every epoch goes through all prompts once, in an order that depends only on `seed` and the epoch (file
    order when `shuffle` is off).
    """

    def __init__(self, prompts: list[Prompt], seed: int, shuffle: bool = True) -> None:
        if not prompts:
            raise UserError("data.prompts: no prompts to train on")
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._position = 0  # prompts drawn since the start of epoch 0
        self._order: tuple[int, list[int]] = (-1, [])  # (epoch, its order)

    def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts, going on into the next epochs where one ends. Their ids are `row@epoch`."""
        drawn = self.peek(n)
        self._position += n
        return drawn

    def peek(self, n: int, skip: int = 0) -> list[Prompt]:
        """What `take(n)` returns once `skip` more prompts have been taken; the position stays."""
        seen = []
        for position in range(self._position + skip, self._position + skip + n):
            epoch, offset = divmod(position, len(self._prompts))
            prompt = self._prompts[self._epoch_order(epoch)[offset]]
            seen.append(replace(prompt, id=f"{prompt.id}@{epoch}"))
        return seen

    def state_dict(self) -> dict[str, int]:
        """The position in the endless sequence."""
        return {"position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at a saved position (of the same prompts, seed and shuffle)."""
        self._position = state["position"]

    def _epoch_order(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            order = list(range(len(self._prompts)))
            if self._shuffle:
                random.Random(f"prompts:{self._seed}:{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1]


def _rendered(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    field: str,
    system_prompt: str | None,
    teacher: TeacherPrompt | None,
) -> list[tuple[str, list[int], list[int]]]:
    """The user's text, the token ids, and those of the teacher's own prompt (none without) of every line."""
    named = template_fields(teacher.template) if teacher else []
    lines = read_rows(path, field, [name for name in named if name != field])
    rows = [chat_messages(line[field], place, system_prompt) for place, line in lines]
    texts = [_user_text(messages) for messages in rows]
    token_ids = tokenise(rows, tokenizer, path)
    if teacher is None:
        return [(text, ids, []) for text, ids in zip(texts, token_ids, strict=True)]
    filled = [teacher.messages(row, line, field) for row, (_, line) in zip(rows, lines, strict=True)]
    return list(zip(texts, token_ids, tokenise(filled, tokenizer, path), strict=True))


def chat_messages(value: str | list[Any], place: str, system_prompt: str | None) -> list[Message]:
    """A prompt as chat messages, the system prompt first; `place` is where it came from. Raises UserError."""
    if isinstance(value, str):
        messages = [{"role": "user", "content": value}]
    else:
        messages = []
        for item in value:
            if not (
                isinstance(item, dict)
                and isinstance(item.get("role"), str)
                and isinstance(item.get("content"), str)
            ):
                raise UserError(f"{place}: a chat message needs 'role' and 'content' as text")
            messages.append({"role": item["role"], "content": item["content"]})
    if system_prompt is not None and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def _user_text(messages: list[Message]) -> str:
    return next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")


def tokenise(
    rows: list[list[Message]], tokenizer: PreTrainedTokenizerBase, path: Path | str
) -> list[list[int]]:
    """One fast batch. A chat template writes its own special tokens; plain text gets the tokenizer's.

    Raises UserError, about `path`, for a prompt that the template refuses.
    """
    if not tokenizer.chat_template:
        plain = ["\n\n".join(message["content"] for message in messages) for messages in rows]
        return [list(ids) for ids in tokenizer(plain)["input_ids"]]
    try:
        rendered = [
            str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
            if messages
            else ""
            for messages in rows
        ]
    except TemplateError as error:
        raise UserError(
            f"{path}: the tokenizer's chat template refuses a prompt ({error}); check the message roles and "
            "data.system_prompt"
        ) from None
    return [list(ids) for ids in tokenizer(rendered, add_special_tokens=False)["input_ids"]]


def _notes(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    dropped_long: int,
    dropped_empty: int,
    dropped_teacher: int,
) -> list[str]:
    notes = []
    if not tokenizer.chat_template:
        notes.append(f"{path}: the tokenizer has no chat template, prompts are used as plain text")
    if dropped_long:
        notes.append(f"{path}: {dropped_long} prompts longer than data.max_prompt_tokens dropped")
    if dropped_empty:
        notes.append(f"{path}: {dropped_empty} empty prompts dropped")
    if dropped_teacher:
        notes.append(
            f"{path}: {dropped_teacher} prompts dropped, as the teacher's are longer than its limit "
            "(teacher.max_prompt_tokens, or else data.max_prompt_tokens)"
        )
    return notes
