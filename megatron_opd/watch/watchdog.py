"""`Watchdog`: ends a run that is stuck, and says which rank was where.

A thread of every rank looks at the phase that this rank is in and tells the others of it, through the store of the
process groups. When a phase has taken longer than it may, that rank says so in one line; all of them write the stacks
of their threads to `stacks/rank_00003.txt` in the run directory and end with exit code 1. A rank whose connection to
another breaks says where both were.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_opd.launch.worker import report_failure
from megatron_opd.watch.phases import Phases

_POLL = 1.0  # seconds between two looks
_SILENT = 5.0  # seconds after which a rank that tells nothing any more counts as silent
_STORE_TIMEOUT = timedelta(seconds=10)
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
_NAMED = 8  # ranks in a line at most
_STUCK = "megatron_opd/stuck"  # in the store: the rank that has found it out


class Watchdog:
    """A context manager around the steps of every rank. `limits`: seconds that a phase may take, those without end
    left out.

    Time in which the whole process was stopped (a suspended job) does not count.
    """

    def __init__(self, phases: Phases, limits: Mapping[str, float], run_dir: Path) -> None:
        self._phases, self._limits, self._folder = phases, limits, run_dir / "stacks"
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._store: Any = None
        self._spent = 0.0  # seconds in the phase that goes on
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        if self._ranks > 1:
            self._store = _get_default_store().clone()  # type: ignore[attr-defined]
            self._store.set_timeout(_STORE_TIMEOUT)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST) and self._ranks > 1:
            time.sleep(_SILENT)  # until one that has ended is silent
            phase, others = self._phases.last or "no phase", self._others(self._phases.last)
            report_failure(f"rank {self._rank} has lost its connection to another in {phase}: {others}")

    def _watch(self) -> None:
        entered, before = -1, time.monotonic()
        while not self._ended.wait(_POLL):
            now = time.monotonic()
            if entered != self._phases.entered or not self._phases.now:
                entered, self._spent = self._phases.entered, 0.0
            self._spent += min(now - before, 5 * _POLL)
            before = now
            with suppress(RuntimeError):  # whoever has the store may have ended, or be stopped
                self._tell()
                self._end_with_another()
            limit = self._limits.get(self._phases.now)
            if limit is not None and self._spent > limit:
                self._end(limit)

    def _tell(self) -> None:
        if self._store is not None:
            text = f"{self._phases.now or 'between phases'}|{self._spent:.0f}|{time.time()}"
            self._store.set(f"megatron_opd/phase/{self._rank}", text)

    def _end_with_another(self) -> None:
        if self._store is not None and self._store.check([_STUCK]):
            self._write_stacks()
            os._exit(1)

    def _end(self, limit: float) -> None:
        """This rank's phase has taken too long: say so, unless another has, and end once the others have seen it."""
        first = True
        with suppress(RuntimeError):
            if self._store is not None:
                mine = str(self._rank)
                first = self._store.compare_set(_STUCK, "", mine) == mine.encode()
        if first:
            name = self._phases.now
            others = f"{self._others(name)}; " if self._ranks > 1 else ""
            report_failure(
                f"rank {self._rank} has been in {name} for {self._spent:.0f} s (section timeouts: at most {limit:g}): "
                f"{others}the stacks of all ranks are in {self._folder}; start the same command again"
            )
        self._write_stacks()
        time.sleep(3 * _POLL)
        os._exit(1)

    def _others(self, mine: str) -> str:
        """Where the ranks are that are silent, or in another phase than this one's."""
        found = []
        for rank in range(self._ranks):
            try:
                name, seconds, when = self._last_of(rank)
            except RuntimeError:
                return "the store of the process groups, which rank 0 or the launcher has, does not answer"
            silent = time.time() - when
            if rank == self._rank or (silent < _SILENT and name == mine):
                continue
            told = (
                f"silent for {silent:.0f} s, last in {name}"
                if silent >= _SILENT
                else f"in {name} ({seconds} s)"
            )
            found.append(f"rank {rank} is {told}")
        more = [f"{len(found) - _NAMED} more elsewhere"] if len(found) > _NAMED else []
        return ", ".join([*found[:_NAMED], *more]) or "so are all others"

    def _last_of(self, rank: int) -> tuple[str, str, float]:
        """Phase of a rank, seconds in it, and when it has said so."""
        key = f"megatron_opd/phase/{rank}"
        if not self._store.check([key]):
            return "the start", "?", 0.0
        name, seconds, when = self._store.get(key).decode().split("|")
        return name, seconds, float(when)

    def _write_stacks(self) -> None:
        with suppress(OSError):  # a full disk keeps no run from ending
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"rank_{self._rank:05d}.txt").open("w") as file:
                phase = self._phases.now or "between phases"
                file.write(f"{time.ctime()}, process {os.getpid()}: {phase}, {self._spent:.0f} s\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
