"""The saves of a run as its loop sees them: begun after a step, completed after a later one, and what they cost.
And the way back: the state that a run goes on from.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Self

from megatron_opd.config.load import changed_keys, load_config
from megatron_opd.config.schema import Config
from megatron_opd.errors import UserError
from megatron_opd.models.gpt import GPT
from megatron_opd.training.job import Job
from megatron_opd.watch.phases import SAVE


class Saves:
    """Saves model, optimizer, prompt position, and a teacher that follows the student. Collective: every rank of the
    student calls every method, in the same order.

    A context manager: leaving it by an error ends what is still being written.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._store = job, job.checkpoints
        self._asynchronous = job.config.checkpoint.asynchronous
        self._began = time.perf_counter()
        self._count, self._seconds, self._taken = 0, 0.0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._store.abandon()

    def begin(self, step: int) -> None:
        """Begin to save `step`, once the save before is complete; unless saves are asynchronous, complete it too."""
        self.finish()
        with self._timed():
            self._job.teacher.before_save(step)
            student, state = self._job.student, {"prompts": self._job.prompts.state_dict()}
            with moving_teacher(self._job) as teacher:
                self._store.save(step, student.chunks, student.optimizer, state, teacher)
        self._count += 1
        if not self._asynchronous:
            self.finish()

    def advance(self) -> None:
        """Complete the save under way if everything of it is written by now."""
        if self._store.under_way:
            with self._timed():
                if self._store.written():
                    self._publish()

    def finish(self) -> None:
        """Wait for the save under way, if there is one, and complete it."""
        if self._store.under_way:
            with self._timed():
                self._publish()

    def take_seconds(self) -> float:
        """Seconds that the training has waited for saves since this was last asked, on this rank."""
        taken, self._taken = self._taken, self._seconds
        return self._seconds - taken

    def cost(self) -> str:
        """For the summary: the waiting of this rank since the run was started."""
        whole = time.perf_counter() - self._began
        part = f"{self._seconds:.1f} s of {whole:.1f} s, {self._seconds / whole:.1%}"
        return f"saved {self._count} checkpoint{'s' * (self._count != 1)}: the training waited {part}"

    def _publish(self) -> None:
        self._job.teacher.before_publish()
        self._store.publish()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        with self._job.phases(SAVE):
            yield
        self._seconds += time.perf_counter() - began


def moving_teacher(job: Job) -> AbstractContextManager[Sequence[GPT]]:
    """Chunks of the average that the teacher becomes; none where it keeps its weights."""
    return nullcontext(()) if job.average is None else job.average.as_model()


def changes_since(config: Config) -> list[str]:
    """What differs from the configuration that the run directory was last used with."""
    saved = config.run_dir / "config.yaml"
    return changed_keys(load_config(saved, []), config) if saved.is_file() else []


def resume(job: Job) -> int:
    """Load the newest intact checkpoint of the run directory, if there is one; returns its step, else 0."""
    folder = job.checkpoints.newest_intact()
    if folder is None:
        return 0
    with moving_teacher(job) as teacher:
        state = job.checkpoints.load(folder, job.student.chunks, job.student.optimizer, teacher)
    job.prompts.load_state_dict(state["prompts"])
    job.student.continue_after(state["step"])
    if state["step"] > job.config.training.steps:
        raise UserError(
            f"training.steps: {job.config.training.steps} is less than the {state['step']} steps that run_dir "
            f"{job.config.run_dir} has behind it: raise it, or give a new run_dir"
        )
    return state["step"]
