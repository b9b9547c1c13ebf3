"""Sampled rollouts in the report: their tokens coloured by weight and by log-gap, with every number on hovering."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_opd.errors import UserError
from megatron_opd.report.runs import Decode, Run

ROLLOUTS = 3  # of a step
TOKENS = 600  # of a rollout
WINDOW = 24  # tokens that are decoded together, so that a letter of several tokens is whole
STRONG_GAP = 4.0  # nats, from which the colour is full
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
NUMBERS = {"weight": "weight", "log_gap": "log-gap", "student_logprob": "student"}


def decoder_of(run: Run) -> Decode | None:
    """Text of token ids by the tokenizer of the exported student, or of the one it started from; None without both."""
    from megatron_opd.data.tokenizer import load_tokenizer

    for folder in (run.folder / "hf", Path(str(run.config.get("student.path")))):
        try:
            return load_tokenizer(folder).decode
        except UserError:
            continue
    return None


def sample_sections(run: Run, number: int, decode: Decode | None) -> str:
    """Rollouts of the run's first, middle and last step that has some, as HTML; a line of text where there are none."""
    steps = sorted(run.sample_files)
    if not steps:
        return "<p class='note'>This run has kept no rollouts.</p>"
    shown = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    kept = {step: run.samples(step) for step in shown}
    weights = [
        w for samples in kept.values() for each in samples for w in _numbers(each, "weight") if w is not None
    ]
    span = (min(weights), max(weights)) if weights else (0.0, 0.0)
    parts = []
    if decode is None:
        parts.append(
            "<p class='note'>No tokenizer is found for this run, so token ids are shown for text.</p>"
        )
    if not any(each.get("trace") for samples in kept.values() for each in samples):
        parts.append(
            "<p class='note'>These rollouts have no record of their tokens' weights and log-gaps.</p>"
        )
    for step, samples in kept.items():
        rollouts = "".join(_rollout(each, span, decode) for each in samples[:ROLLOUTS])
        parts.append(f"<h4>Step {step}</h4>{rollouts}")
    return "".join(parts)


def pieces(ids: Sequence[int], decode: Decode) -> list[str]:
    """The text that each token adds, so that they make the text together.

    A letter that takes several tokens is in the last of them.
    """
    texts, start, before = [], 0, ""
    for i in range(len(ids)):
        whole = decode(list(ids[start : i + 1]))
        if whole.endswith(UNFINISHED) and i + 1 < len(ids) and i - start < 2 * WINDOW:
            texts.append("")
            continue
        texts.append(whole[len(before) :])
        before = whole
        if i + 1 - start >= WINDOW:
            # The next token is decoded behind this one: some tokenizers treat the first of a text differently.
            start, before = i, decode([ids[i]])
    return texts


def _rollout(sample: Mapping[str, Any], span: tuple[float, float], decode: Decode | None) -> str:
    ids = sample["response_ids"][:TOKENS]
    texts = [f"{token} " for token in ids] if decode is None else pieces(ids, decode)
    numbers = {name: _numbers(sample, name) for name in NUMBERS}
    tokens = "".join(
        _token(text, {name: row[i] if i < len(row) else None for name, row in numbers.items()}, span)
        for i, text in enumerate(texts)
    )
    rest = len(sample["response_ids"]) - len(ids)
    more = f"<span class='note'> … {rest} more tokens</span>" if rest else ""
    end = sample.get("finish_reason")
    length = f"{len(sample['response_ids'])} tokens"
    ending = {"stop": "ended by itself", "length": "cut at the length limit"}.get(str(end), "")
    about = " · ".join(part for part in (length, ending, _summary(numbers)) if part)
    return (
        f"<article><details class='prompt'><summary>prompt</summary><pre>{escape(sample['prompt'])}</pre></details>"
        f"<div class='tokens'>{tokens}{more}</div><p class='note'>{escape(about)}</p></article>"
    )


def _token(text: str, numbers: Mapping[str, float | None], span: tuple[float, float]) -> str:
    weight, gap, student = numbers["weight"], numbers["log_gap"], numbers["student_logprob"]
    shown = escape(text).replace("\n", "<i>↵</i>\n")
    if all(value is None for value in numbers.values()):
        return f"<span class='out' title='not in the loss'>{shown}</span>"
    style, words = [], []
    if weight is not None:
        place = (weight - span[0]) / (span[1] - span[0]) if span[1] > span[0] else 0.0
        style.append(f"--w:{place:.2f}")
        words.append(f"weight {weight:.3f}")
    if gap is not None:
        style.append(f"--g:{min(1.0, abs(gap) / STRONG_GAP):.2f}")
        words.append(f"log-gap {gap:+.2f}")
    if student is not None:
        words.append(f"student {student:.2f}")
        words += [f"teacher {student + gap:.2f}"] if gap is not None else []
    kind = "less" if gap is not None and gap < 0 else "more"
    return f"<span class='{kind}' style='{';'.join(style)}' title='{', '.join(words)}'>{shown}</span>"


def _summary(numbers: Mapping[str, Sequence[float | None]]) -> str:
    gaps = [gap for gap in numbers["log_gap"] if gap is not None]
    return f"mean log-gap {sum(gaps) / len(gaps):+.2f} nats" if gaps else ""


def _numbers(sample: Mapping[str, Any], name: str) -> Sequence[float | None]:
    return sample.get("trace", {}).get(name, ())
