"""Routed prompts: a field of their lines names the teacher of each, which alone scores the responses to it."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_opd.data.jsonl import read_rows
from megatron_opd.data.packing import Microbatch, count_tokens, response_starts
from megatron_opd.data.prompts import LoadedPrompts, Prompt
from megatron_opd.data.rollouts import Rollout
from megatron_opd.errors import UserError


def routed(loaded: LoadedPrompts, path: Path, field: str, names: Collection[str]) -> LoadedPrompts:
    """The prompts that were loaded from `path`, each with the one of `names` that `field` of its line is.

    Raises UserError naming file and line where it is missing or none of them.
    """
    routes = [(place, row[field]) for place, row in read_rows(path, field, key="teacher.route_field")]
    for place, name in routes:
        if not isinstance(name, str) or name not in names:
            raise UserError(
                f"{place}: {field} {name!r} is no teacher of teacher.paths: use one of {', '.join(names)}, or add it"
            )
    prompts = [replace(prompt, route=routes[int(prompt.id)][1]) for prompt in loaded.prompts]
    return replace(loaded, prompts=prompts)


def check_all_teach(prompts: Sequence[Prompt], names: Collection[str]) -> None:
    """Raises UserError for a teacher of `names` that no prompt is routed to."""
    unused = [name for name in names if name not in {prompt.route for prompt in prompts}]
    if unused:
        raise UserError(
            f"teacher.paths.{unused[0]}: no prompt of data.prompts that is used names it in teacher.route_field: "
            "remove it"
        )


def routes_digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the prompts' teachers, in order."""
    return hashlib.sha256(repr([prompt.route for prompt in prompts]).encode()).hexdigest()


def pack_by_route(
    rollouts: Sequence[Rollout], pack: Callable[..., list[list[Microbatch]]]
) -> tuple[list[list[Microbatch]], list[str]]:
    """Microbatches of one teacher's rollouts each, a list for each data-parallel rank; and their teachers by index.

    `pack` packs the rollouts of one teacher, as `packing.pack` with its `starts`. So the i-th microbatches of all ranks
    have the same teacher. Of each teacher's lists the one with most tokens goes to the rank that has fewest so far.
    """
    shares: dict[str, list[Rollout]] = {}
    starts: dict[str, list[int]] = {}
    for rollout, start in zip(rollouts, response_starts(rollouts), strict=True):
        shares.setdefault(rollout.route, []).append(rollout)
        starts.setdefault(rollout.route, []).append(start)
    if len(shares) < 2:
        packed = pack(rollouts)
        return packed, [*shares, ""][:1] * len(packed[0])
    of_ranks: list[list[Microbatch]] = []
    routes: list[str] = []
    for route in sorted(shares):
        packed = sorted(pack(shares[route], starts=starts[route]), key=count_tokens, reverse=True)
        of_ranks = of_ranks or [[] for _ in packed]
        for mine, more in zip(sorted(of_ranks, key=count_tokens), packed, strict=True):
            mine.extend(more)
        routes += [route] * len(packed[0])
    return of_ranks, routes
