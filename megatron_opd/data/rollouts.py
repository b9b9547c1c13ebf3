"""A rollout: one response that the student drew for a prompt, and its JSONL form."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_opd.errors import UserError

TEXT_FIELDS = {"prompt", "response"}  # written for people only


@dataclass(frozen=True)
class Rollout:
    """One sampled response with what the sampler knew when it drew it.

    `response_ids` includes the stop token when one was drawn. `logprobs` (nats, one per response token) are
    under the sampling policy: after temperature, before top-p and top-k truncation.
    """

    prompt_id: str
    sample: int
    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop" (a stop token was drawn) or "length" (max_new_tokens reached)
    weight_version: int  # optimizer steps taken by the weights that drew it


def write_rollouts(
    path: Path, rollouts: Iterable[Rollout], *, decode: Callable[[list[int]], str] | None = None
) -> None:
    """Write one JSON object a line, aside and then renamed, so that a reader never meets half a file.

    Lossless: floats are written with the digits that read back as the same number. With `decode` (token ids
    to text) every object also gets `prompt` and `response` as text, for people; `read_rollouts` ignores them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        for rollout in rollouts:
            record = asdict(rollout)
            if decode is not None:
                record |= {"prompt": decode(rollout.prompt_ids), "response": decode(rollout.response_ids)}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(aside, path)


def read_rollouts(path: Path) -> list[Rollout]:
    """Read what `write_rollouts` wrote.

    Raises UserError naming file and line for a missing file, a broken line, or a missing or unknown field.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such rollout file")
    expected = {field.name for field in fields(Rollout)}
    rollouts = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error.msg})") from None
            if not isinstance(record, dict) or set(record) - TEXT_FIELDS != expected:
                raise UserError(
                    f"{path}, line {number}: a rollout needs exactly the fields {sorted(expected)}"
                )
            rollouts.append(Rollout(**{name: record[name] for name in expected}))
    return rollouts
