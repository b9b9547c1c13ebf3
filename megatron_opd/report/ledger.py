"""rollouts/ledger.jsonl: which rollouts each step has trained on, so that none is lost or counted twice."""

from collections.abc import Sequence
from pathlib import Path

from megatron_opd.data.rollouts import Rollout
from megatron_opd.report.step_lines import StepLines

LEDGER_FILE = Path("rollouts") / "ledger.jsonl"


class Ledger:
    """Writes a run's ledger; use on rank 0 only.

    `last_kept` is the step of the checkpoint that the run continues from: what a later step consumed, it will consume
    again, and the old lines are moved to ledger.discarded.jsonl.
    """

    def __init__(self, run_dir: Path, last_kept: int) -> None:
        self._lines = StepLines(run_dir / LEDGER_FILE, last_kept)

    def log(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Append a step, with the prompt, sample, versions of the weights (in order) and tokens of every rollout."""
        consumed = [
            {
                "prompt": rollout.prompt_id,
                "sample": rollout.sample,
                "versions": [rollout.weight_version, *(version for _, version in rollout.version_changes)],
                "tokens": len(rollout.response_ids),
            }
            for rollout in rollouts
        ]
        self._lines.append({"step": step, "rollouts": consumed})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()
