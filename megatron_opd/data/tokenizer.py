"""Tokenizers: loading from a model folder, stop ids, and whether student and teacher share one vocabulary."""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_opd.errors import UserError

ROLES = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


@dataclass(frozen=True)
class TokenizerFingerprint:
    """What two tokenizers must share for their ids to mean the same, and what is merely good to know."""

    tokens: dict[int, str]  # id -> token, added tokens included
    special_ids: frozenset[int]  # ids of the tokens declared special
    roles: dict[str, int | None]  # bos, eos, pad, unk
    chat_template: str | None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a HF folder or a Megatron folder, never from the network; no code in the folder is run.

    Raises UserError when the folder is missing or holds no readable tokenizer.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such model folder; check student.path, teacher.path and reference.path"
        )
    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    ):
        raise UserError(
            f"{folder}: holds no tokenizer (tokenizer.json); copy the model's tokenizer files there"
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise UserError(f"{folder}: the tokenizer cannot be read ({str(error).splitlines()[0]})") from error


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a response, ascending: `eos_token_id` of generation_config.json and of the tokenizer.

    Raises UserError when there is none: every rollout would then run to the length limit.
    """
    ids: set[int] = set()
    file = folder / "generation_config.json"
    if file.is_file():
        try:
            declared = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except json.JSONDecodeError as error:
            raise UserError(f"{file}: not valid JSON ({error.msg})") from None
        ids.update(declared if isinstance(declared, list) else [declared] if declared is not None else [])
    if isinstance(tokenizer.eos_token_id, int):
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise UserError(
            f"{folder}: neither generation_config.json nor the tokenizer names an end-of-sequence token"
        )
    return tuple(sorted(ids))


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> TokenizerFingerprint:
    """Everything that decides what an id means."""
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    template = tokenizer.chat_template
    return TokenizerFingerprint(
        tokens=tokens,
        special_ids=frozenset(special | set(tokenizer.all_special_ids)),
        roles={role: getattr(tokenizer, role) for role in ROLES},
        chat_template=template
        if template is None or isinstance(template, str)
        else json.dumps(template, sort_keys=True),
    )


def check_same_tokenizer(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, key: str = "teacher.path"
) -> str | None:
    """Check that every id means the same token to both models; `key` names the folder of the second one.

    Returns a warning for harmless differences, or None: a different chat template or different
    bos/eos/pad/unk roles (base against instruct models) do not matter because both models see the same ids,
    rendered and stopped by the student's tokenizer. Raises UserError saying what differs: the number of
    tokens, the first id with both tokens, or which ids are special.
    """
    ours, theirs = fingerprint(student), fingerprint(teacher)
    role = key.removesuffix(".path").replace(".paths.", " ")
    differ = f"student.path and {key} have different tokenizers"
    if ours.tokens != theirs.tokens:
        raise UserError(f"{differ}: {_token_difference(ours, theirs, role)}")
    differing = sorted((ours.special_ids ^ theirs.special_ids) - _role_ids(ours, theirs))
    if differing:
        index = differing[0]
        owner = "student" if index in ours.special_ids else role
        raise UserError(f"{differ}: id {index} ({ours.tokens.get(index)!r}) is special for the {owner} only")
    warnings = [
        f"{token} is {ours.roles[token]} for the student and {theirs.roles[token]} for the {role}"
        for token in ROLES
        if ours.roles[token] != theirs.roles[token]
    ]
    if ours.chat_template != theirs.chat_template:
        warnings.append("the chat templates differ")
    if not warnings:
        return None
    return "tokenizers: " + "; ".join(warnings) + " (the student's are used)"


def _role_ids(ours: TokenizerFingerprint, theirs: TokenizerFingerprint) -> frozenset[int]:
    """Ids that are special in one tokenizer only because it gives them a role (eos, pad) there."""
    return frozenset(index for side in (ours, theirs) for index in side.roles.values() if index is not None)


def _token_difference(ours: TokenizerFingerprint, theirs: TokenizerFingerprint, role: str) -> str:
    shared = ours.tokens.keys() & theirs.tokens.keys()
    first = min((index for index in shared if ours.tokens[index] != theirs.tokens[index]), default=None)
    parts = []
    if len(ours.tokens) != len(theirs.tokens):
        parts.append(f"the student has {len(ours.tokens)} tokens, the {role} {len(theirs.tokens)}")
    if first is not None:
        parts.append(
            f"id {first} is {ours.tokens[first]!r} for the student, {theirs.tokens[first]!r} for the {role}"
        )
    if not parts or first is None:
        index = min(ours.tokens.keys() ^ theirs.tokens.keys())
        owner = "student" if index in ours.tokens else role
        token = ours.tokens.get(index, theirs.tokens.get(index))
        parts.append(f"id {index} ({token!r}) exists for the {owner} only")
    return "; ".join(parts)
