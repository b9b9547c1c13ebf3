"""rollouts/step_....jsonl: some rollouts of every step, for people to read."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_opd.data.rollouts import Rollout, write_rollouts

SAMPLES = 16  # rollouts kept of each step
_PREFIX = "step_"


def write_samples(
    run_dir: Path,
    step: int,
    rollouts: Sequence[Rollout],
    *,
    decode: Callable[[list[int]], str],
    traces: Sequence[Mapping[str, Sequence[float | None]]] = (),
) -> None:
    """Write the first rollouts of a step, with the texts that `decode` makes of token ids, and their `traces`."""
    path = _folder(run_dir) / f"{_PREFIX}{step:08d}.jsonl"
    write_rollouts(path, rollouts[:SAMPLES], decode=decode, traces=traces)


def set_samples_aside(run_dir: Path, last_kept: int) -> None:
    """Move the samples of steps after `last_kept`, which a resumed run draws anew, to discarded/ beside them.

    A step that was discarded before keeps its older samples there too, under a name with a number.
    """
    aside = _folder(run_dir) / "discarded"
    for path in sorted(_folder(run_dir).glob(f"{_PREFIX}*.jsonl")):
        if int(path.stem.removeprefix(_PREFIX)) > last_kept:
            aside.mkdir(exist_ok=True)
            times = sum(1 for _ in aside.glob(f"{path.stem}.*"))
            os.replace(path, aside / f"{path.stem}.{times}.jsonl")


def _folder(run_dir: Path) -> Path:
    return run_dir / "rollouts"
