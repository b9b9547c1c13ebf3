"""A rollout: one response that the student drew for a prompt, and its JSONL form."""

import base64
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_opd.errors import UserError
from megatron_opd.objectives.kept_ids import KeptIds

READABLE_FIELDS = {"prompt", "response", "trace"}  # written for people and the report only
OPTIONAL_FIELDS = {"drawn_logprobs", "kept_ids", "teacher_prompt_ids", "route"}  # where they say something


@dataclass(frozen=True)
class Rollout:
    """One sampled response with what the sampler knew when it drew it.

    `response_ids` includes the stop token when one was drawn. `logprobs` (nats, one per response token) are
    under the sampling policy: after temperature, before top-p and top-k truncation. `drawn_logprobs` are after it,
    renormalised over the ids that were left; not given, nothing was cut and they are `logprobs`.
    """

    prompt_id: str
    sample: int
    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop" (a stop token was drawn) or "length" (max_new_tokens reached)
    weight_version: int  # optimizer steps taken by the weights that drew its first token
    # [token, version] where newer weights took over, drawing that token and those after it
    version_changes: list[list[int]] = field(default_factory=list)
    drawn_logprobs: list[float] = field(default_factory=list)
    kept_ids: KeptIds = field(default_factory=KeptIds.of)  # of every token, or of none: not recorded
    teacher_prompt_ids: list[int] = field(default_factory=list)  # the teacher's own; empty: prompt_ids
    route: str = ""  # the prompt's

    def __post_init__(self) -> None:
        if not self.drawn_logprobs:
            object.__setattr__(self, "drawn_logprobs", self.logprobs)

    @property
    def token_versions(self) -> list[int]:
        """The version of the weights that drew each response token."""
        versions = [self.weight_version] * len(self.response_ids)
        for token, version in self.version_changes:
            versions[token:] = [version] * (len(versions) - token)
        return versions


def write_rollouts(
    path: Path,
    rollouts: Iterable[Rollout],
    *,
    decode: Callable[[list[int]], str] | None = None,
    traces: Sequence[Mapping[str, Sequence[float | None]]] = (),
) -> None:
    """Write one JSON object a line, see `write_objects`.

    Lossless: floats are written with the digits that read back as the same number, the kept ids as base64 of their
    compressed int32. With `decode` (token ids to text) every object also gets `prompt` and `response` as text, for
    people, and with `traces`, one a rollout or for the first of them, a `trace`: lists with a number a response token.
    `read_rollouts` ignores them.
    """

    def records() -> Iterator[dict[str, Any]]:
        """The object of each rollout."""
        for index, rollout in enumerate(rollouts):
            record = _record(rollout)
            if decode is not None:
                record |= {"prompt": decode(rollout.prompt_ids), "response": decode(rollout.response_ids)}
            if index < len(traces):
                record["trace"] = traces[index]
            yield record

    write_objects(path, records())


def write_objects(path: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, aside and then renamed, so that a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in objects)
    os.replace(aside, path)


def read_rollouts(path: Path) -> list[Rollout]:
    """Read what `write_rollouts` wrote.

    Raises UserError naming file and line for a missing file, a broken line, or a missing or unknown field.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such rollout file")
    known = {field.name for field in fields(Rollout)}
    rollouts = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error.msg})") from None
            found = set(record) - READABLE_FIELDS if isinstance(record, dict) else set()
            if not known - OPTIONAL_FIELDS <= found <= known:
                raise UserError(
                    f"{path}, line {number}: a rollout needs exactly the fields {sorted(known - OPTIONAL_FIELDS)}, and "
                    f"may have {sorted(OPTIONAL_FIELDS)}"
                )
            values = {name: record[name] for name in found}
            if "kept_ids" in values:
                values["kept_ids"] = _unpacked(values["kept_ids"])
            rollouts.append(Rollout(**values))
    return rollouts


def _record(rollout: Rollout) -> dict[str, Any]:
    """The fields as JSON has them, the optional ones only if they say something."""
    record: dict[str, Any] = {each.name: getattr(rollout, each.name) for each in fields(rollout)}
    if rollout.drawn_logprobs == rollout.logprobs:
        del record["drawn_logprobs"]
    if not rollout.teacher_prompt_ids:
        del record["teacher_prompt_ids"]
    if not rollout.route:
        del record["route"]
    kept = record.pop("kept_ids")
    if len(kept):
        ids = zlib.compress(kept.ids_E.numpy().astype("<i4").tobytes())
        record["kept_ids"] = {"counts": kept.counts_N.tolist(), "ids": base64.b64encode(ids).decode()}
    return record


def _unpacked(written: dict[str, Any]) -> KeptIds:
    ids = np.frombuffer(zlib.decompress(base64.b64decode(written["ids"])), dtype="<i4").astype(np.int32)
    return KeptIds.counted(torch.from_numpy(ids), torch.tensor(written["counts"], dtype=torch.int64))
