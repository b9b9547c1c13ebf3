"""Write the files of a checkpoint's state from processes of their own, while the training goes on.

megatron-core plans a save and finishes it, in step on all ranks; in between each file is written by a process forked
here, which has the numbers as they were at the fork whatever the training does to them. (megatron-core's own writer
waits for ever for one of its processes that was killed, and has its results handed over by a server that outlives a
killed training.) The processes end with this one, see `launch.worker.end_forks_with_this_process`.
"""

import gc
import multiprocessing
import os
import pickle
import queue
import signal
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, BinaryIO

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_opd.checkpoint.checksums import checksum

# What may stop a run, which then waits for its save.
_OURS_TO_HEED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StateWriting:
    """The state of a checkpoint on its way to `folder`; every rank of WORLD has one, those without a state too.

    Nothing of `state` is needed any more once it is constructed. `all_save` says that every rank has a state. Raises
    what megatron-core raises for a plan that cannot be made or a file that rank 0 cannot write. Collectives:
    those of the plan, over WORLD.
    """

    def __init__(self, state: dict[str, Any], folder: Path, *, all_save: bool) -> None:
        self._results: queue.Queue[Any] = queue.Queue()
        filesystem_async._results_queue = self._results
        self._request = dist_checkpointing.save(
            state,
            str(folder),
            async_sharded_save=True,
            # megatron-core warns of ranks that differ in what is common
            preprocess_common_before_consistancy_check=None if all_save else _nothing,
        )
        # Kept until they are written: pinned host memory that is given back would be used again under the writers.
        self._files = [] if self._request.preload_fn is None else self._request.preload_fn()
        self._writers = [self._start(index) for index in range(len(self._files))]

    def _start(self, index: int) -> tuple[ForkProcess, BinaryIO]:
        outcome = os.fdopen(os.memfd_create(f"outcome{index}"), "w+b")  # holds any size, also on a full disk
        transforms = self._request.async_fn.args[0]
        process = multiprocessing.get_context("fork").Process(
            target=_write, args=(transforms, index, self._files[index], outcome), daemon=True
        )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _OURS_TO_HEED)  # until the writer ignores them
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return process, outcome

    @property
    def done(self) -> bool:
        """Whether this rank's files are written, or their writers have failed."""
        return not any(process.is_alive() for process, _ in self._writers)

    def finish(self) -> dict[str, str]:
        """Wait for this rank's files and complete the state; returns their names with their SHA-256.

        Raises CheckpointException on every rank when a file of any could not be written; only rank 0's says why.
        Collectives: megatron-core's, over WORLD.
        """
        outcomes = [_outcome(*writer) for writer in self._writers]
        failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        written = [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
        if self._writers:  # read by megatron-core's first function below
            self._results.put(failures[0] if failures else dict(enumerate(results for results, _ in written)))
        for complete in self._request.finalize_fns:
            complete()
        sums = (found for _, found in written)
        return {Path(path).name: found for (path, *_), found in zip(self._files, sums, strict=True)}

    def abandon(self) -> None:
        """Kill the writers of this rank."""
        for process, _ in self._writers:
            process.kill()
            process.join()


def merged(sums: dict[str, str]) -> dict[str, str]:
    """What all ranks of WORLD have, on rank 0; {} on the others. 1 gather."""
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(sums, everyone, dst=0)
    return {name: found for each in everyone or () for name, found in each.items()}


def _write(transforms: list[Any], index: int, bucket: Any, outcome: BinaryIO) -> None:
    """Runs in the forked process: write one file, read it back for its checksum, leave both results in `outcome`."""
    gc.disable()  # it would free what belongs to the GPU of the process before the fork
    for number in _OURS_TO_HEED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS_TO_HEED)
    results: queue.Queue[Any] = queue.Queue()
    count: queue.Queue[int] = queue.Queue()
    count.put(index)
    FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, results, count, use_fsync=True)
    _, written = results.get()
    found = written if isinstance(written, Exception) else (written, checksum(Path(bucket[0])))
    pickle.dump(found, outcome)
    outcome.flush()


def _nothing(common: dict[str, Any]) -> dict[str, Any]:
    del common
    return {}


def _outcome(process: ForkProcess, outcome: BinaryIO) -> tuple[list[Any], str] | Exception:
    process.join()
    outcome.seek(0)
    with outcome:
        try:
            found: tuple[list[Any], str] | Exception = pickle.load(outcome)
        except (EOFError, pickle.UnpicklingError):  # killed before, or while it was written
            code = process.exitcode or 0
            killed = f"was killed by {signal.Signals(-code).name}" if code < 0 else ""
            return RuntimeError(f"a writer {killed or f'ended with exit code {code}'}")
    return found
