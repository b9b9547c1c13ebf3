"""What a run tells the user while it goes and when it ends: rank 0's bar, metrics, samples, curve and summary."""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_opd.data.rollouts import Rollout
from megatron_opd.errors import UserError, why_refused
from megatron_opd.report.ledger import Ledger
from megatron_opd.report.metrics import MetricsWriter, read_metrics
from megatron_opd.report.page import REPORT_FILE, write_report
from megatron_opd.report.plot import plot_curve
from megatron_opd.report.positions import POSITIONS_FILE, Diagnostics
from megatron_opd.report.progress import TrainingProgress
from megatron_opd.report.samples import set_samples_aside, write_samples
from megatron_opd.report.step_lines import StepLines

HELDOUT = {
    "eval/reverse_kl": "held-out reverse KL",
    "eval/reverse_kl_sampled": "held-out reverse KL, estimated from sampled tokens",
}


def task_lines(values: Mapping[str, float]) -> list[str]:
    """A line on every task whose scores are among the metrics."""
    lines: dict[str, str] = {}
    for name, value in values.items():
        found = re.fullmatch(r"eval/(.+)/((?:avg|pass|maj)@\d+)", name)
        if found:
            low, high = values[f"{name}_low"], values[f"{name}_high"]
            said = f"{found[2]} {value:.1%} [{low:.1%}, {high:.1%}]"
            lines[found[1]] = f"{lines[found[1]]}, {said}" if found[1] in lines else f"{found[1]} {said}"
    return list(lines.values())


class RunLog:
    """Records the steps of a run in its directory. A context manager; on ranks other than 0 it does nothing.

    `start` is the step that the run resumes from (0: anew); what an earlier life of the run recorded after it no
    longer counts: its metrics, ledger, positions and samples are set aside, the samples of its evaluations removed.
    `decode` turns token ids into text.

    Every method raises UserError when the disk is full or cannot be written.
    """

    def __init__(
        self, run_dir: Path, *, start: int, steps: int, enabled: bool, decode: Callable[[list[int]], str]
    ) -> None:
        self.run_dir = run_dir
        self.enabled = enabled
        self._decode = decode
        if not enabled:
            return
        self._progress = TrainingProgress(steps, start)
        with self._writing():
            self._metrics = MetricsWriter(run_dir, start or None)
            self._ledger = Ledger(run_dir, start)
            self._positions = StepLines(run_dir / POSITIONS_FILE, start)
            set_samples_aside(run_dir, start)
            for path in (run_dir / "evaluation").glob("step_*"):
                if int(path.name.removeprefix("step_")) > start:
                    shutil.rmtree(path)

    def __enter__(self) -> Self:
        if self.enabled:
            self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self._progress.__exit__(kind, error, trace)
            # Closing writes what a full disk has left in the buffers; an earlier error says more than that.
            with self._writing() if error is None else suppress(OSError):
                self._metrics.close()
                self._ledger.close()
                self._positions.close()

    def say(self, line: str) -> None:
        """Print one line, above the bar where there is one."""
        if self.enabled:
            self._progress.say(line)

    def record(
        self,
        step: int,
        values: Mapping[str, float],
        rollouts: Sequence[Rollout] = (),
        diagnostics: Diagnostics | None = None,
    ) -> None:
        """Append a step's metrics and what is known of it by position, enter its rollouts in the ledger, keep a sample.

        Step 0 is the state before training.
        """
        if not self.enabled:
            return
        with self._writing():
            self._metrics.log(step, values)
            if step > 0:
                self._ledger.log(step, rollouts)
                seen = diagnostics or Diagnostics()
                write_samples(self.run_dir, step, rollouts, decode=self._decode, traces=seen.traces)
                if seen.positions is not None:
                    self._positions.append({"step": step, **seen.positions})
        if step > 0:
            self._progress.update(step, values)
        if values.get("skipped"):
            self.say(f"step {step}: update skipped (gradient norm not finite, or no response tokens)")
        for name, what in HELDOUT.items():
            if name in values:
                self.say(f"step {step}: {what} {values[name]:.4f} nats/token")
        for line in task_lines(values):
            self.say(f"step {step}: {line}")

    def complete(self, step: int, values: Mapping[str, float]) -> None:
        """Add what is known only now to the metrics of the last step that was recorded."""
        if self.enabled:
            with self._writing():
                self._metrics.complete(step, values)

    def report(self) -> None:
        """Write the report of a run that has stopped before its end, and say where it is."""
        if self.enabled and any(row.get("loss") is not None for row in read_metrics(self.run_dir)):
            page = self._report()
            if page is not None:
                self.say(f"report: {page}")

    def summarise(self, *, checkpoint: Path, export: Path | None) -> None:
        """Draw the curve, write the report and print what the run achieved and where its outputs are."""
        if not self.enabled:
            return
        rows = read_metrics(self.run_dir)
        for name, what in HELDOUT.items():
            heldout = [row[name] for row in rows if row.get(name) is not None]
            if len(heldout) > 1:
                self.say(f"{what}: {heldout[0]:.3f} before, {heldout[-1]:.3f} after (nats per token)")
        skipped = sum(row.get("skipped", 0) for row in rows)
        if skipped:
            self.say(f"skipped updates: {skipped}")
        curve = page = None
        if any(row.get("loss") is not None for row in rows):
            with self._writing():
                curve = plot_curve(self.run_dir)
            page = self._report()
        else:
            self.say(
                "no step had a token that enters the loss: see objective.mask and rollout.max_new_tokens"
            )
        width = shutil.get_terminal_size().columns
        outputs = {
            "checkpoint": checkpoint,
            "Hugging Face": export,
            "metrics": self.run_dir / "metrics.jsonl",
            "TensorBoard": self.run_dir / "tensorboard",
            "samples": self.run_dir / "rollouts",
            "curve": curve,
            "report": page,
        }
        self.say("─" * min(width, 80))
        for name, path in outputs.items():
            if path is not None:
                self.say(f"{name:>12}  {path}")

    def _report(self) -> Path | None:
        """Write the report; what keeps it from being written is told and ends nothing, for the training is done."""
        page = self.run_dir / REPORT_FILE
        try:
            with self._writing():
                write_report([self.run_dir], page, self._decode)
        except Exception as error:  # whatever a page stumbles over
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self.say(f"no report: {kind}{' '.join(str(error).split())[:300]}")
            return None
        return page

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk or a refused write becomes a UserError."""
        try:
            yield
        except OSError as error:
            reason = why_refused(error)
            if reason is None:
                raise
            raise UserError(
                f"cannot write to {self.run_dir}: {reason}; mend that and start the same command again to resume"
            ) from error
