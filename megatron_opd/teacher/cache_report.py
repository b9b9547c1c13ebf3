"""What a teacher's cache holds, as text: a folder's files by who said what, one file token by token."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_opd.errors import UserError, why_refused
from megatron_opd.teacher.cache import cached_files, read_file

SHOWN = 5  # likeliest ids of a token
Name = Callable[[int], str]


@dataclass
class _Held:
    sequences: int = 0
    nbytes: int = 0


def describe_folder(folder: Path) -> str:
    """Sequences and bytes of each teacher and kind of payload, one a line; headers alone are read."""
    held: dict[tuple[str, ...], _Held] = {}
    for _, size, path in sorted(cached_files(folder)):
        found = held.setdefault(_source(path), _Held())
        found.sequences += 1
        found.nbytes += size
    if not held:
        raise UserError(f"{folder} holds nothing that a teacher has said: name the folder of teacher.cache")
    total = sum(found.nbytes for found in held.values())
    count = sum(found.sequences for found in held.values())
    lines = [f"{folder}: {count:,} sequences, {total / 1e9:.3f} GB"]
    lines += [
        f"  {' '.join(source)}: {found.sequences:,} sequences, {found.nbytes / 1e9:.3f} GB"
        for source, found in held.items()
    ]
    return "\n".join(lines)


def _source(path: Path) -> tuple[str, ...]:
    """Teacher, engine, kind and what else counts, of a file's header."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        about = header["__metadata__"]
        return _words(about)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return ("damaged",)


def _words(about: dict[str, str]) -> tuple[str, ...]:
    words = [f"teacher {about['teacher'][:12]}", about["engine"], about["kind"], about["dtype"]]
    words += [f"{key} {about[key]}" for key in ("k", "temperature") if key in about]
    return tuple(words)


def describe_file(path: Path, name: Name) -> str:
    """A line a token of the loss: its log-prob and the likeliest ids, as far as the payload says; `name` of an id.

    Raises UserError for a file that cannot be read or is damaged.
    """
    tensors, about = read_file(path)
    positions, targets = tensors["positions"].tolist(), tensors["targets"].tolist()
    lines = [" ".join(_words(about)), "".join(map(name, tensors["tokens"].tolist())), ""]
    logprob, ids, ids_logprob = _said(tensors)
    for row, (position, target) in enumerate(zip(positions, targets, strict=True)):
        cells = [f"{position + 1:5d}  {name(target)!r}"]
        if logprob is not None:
            cells.append(f"{logprob[row].item():.3f}")
        if ids is not None and ids_logprob is not None:
            pairs = zip(ids[row, :SHOWN].tolist(), ids_logprob[row, :SHOWN].tolist(), strict=True)
            cells.append(", ".join(f"{name(best)!r} {value:.3f}" for best, value in pairs))
        lines.append("  ".join(cells))
    if logprob is None:
        lines.append(
            "hidden states: what they say takes the teacher's head; with teacher.payload topk it is here"
        )
    return "\n".join(lines)


def _said(tensors: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Log-probs [R] of the tokens, the likeliest ids [R, K] in order, and their log-probs; None: not known."""
    if "logits" in tensors:
        full_RV = tensors["logits"].float().log_softmax(-1)
        best = full_RV.topk(min(SHOWN, full_RV.shape[1]))
        return full_RV.gather(1, tensors["targets"][:, None].long())[:, 0], best.indices, best.values
    if "ids" not in tensors:
        return tensors.get("logprob"), None, None
    order = tensors["ids_logprob"].argsort(1, descending=True)
    return tensors["logprob"], tensors["ids"].gather(1, order), tensors["ids_logprob"].gather(1, order)


def describe(path: Path, name: Name) -> str:
    """Of a folder or of one file. Raises UserError for what is neither."""
    try:
        return describe_folder(path) if path.is_dir() else describe_file(path, name)
    except OSError as error:
        raise UserError(f"cannot read {path}: {why_refused(error) or error.strerror}") from None
