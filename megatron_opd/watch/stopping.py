"""`Stopping`: a signal to any rank has the whole run save and end with REQUEUE_EXIT.

The first SIGUSR1, SIGTERM or SIGINT asks for it. The rank that has it tells the others through the store of the process
groups; at the end of a step all agree by a reduction, rollouts are cut off before. A second signal to the same rank
ends it at once. Signals are read by a thread, for Python's own handlers wait until a collective returns.
"""

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_opd.launch.worker import REQUEUE_EXIT, leave_exit_code

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_KEY = "megatron_opd/stop"  # in the store: the number of the signal
_POLL = 1.0  # seconds between two looks at the store
_SAME = 1.0  # seconds in which a signal that comes twice, from a launcher and to its whole group, counts once


class Stopping:
    """A context manager for the main thread of every rank.

    Until `begin` there is nothing to save: SIGUSR1, which only a scheduler sends, ends the process with REQUEUE_EXIT,
    the others end it as if this were not here. After `leave` signals are ignored.
    """

    def __init__(self) -> None:
        self._mine = self._others = 0  # the signal that this rank has got, and that another has; 0: none
        self._since = 0.0  # when it was
        self._begun = False
        self._store: Any = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._receiving, self._sending = socket.socketpair()
        self._sending.setblocking(False)
        self._receiving.settimeout(_POLL)
        self._wakeup_before = signal.set_wakeup_fd(self._sending.fileno(), warn_on_full_buffer=False)
        self._handle(signal.SIGUSR1)
        os.register_at_fork(after_in_child=self._forget)
        self._thread = threading.Thread(target=self._read, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        self._sending.close()  # which ends the thread
        self._thread.join()
        self._receiving.close()
        for number, handler in self._before.items():
            if signal.getsignal(number) is not signal.SIG_IGN:  # see `leave`
                signal.signal(number, handler)
        self._before = {}

    @property
    def requested(self) -> bool:
        """Whether this rank knows of a signal, to itself or to another rank. The others may not know yet."""
        return bool(self._mine or self._others)

    def begin(self) -> None:
        """From now on a signal has the run saved. Every rank calls it, once process groups are there."""
        if dist.get_world_size() > 1:
            self._store = _get_default_store().clone()  # type: ignore[attr-defined]
        self._begun = True
        for number in SIGNALS[1:]:
            self._handle(number)

    def agreed(self, group: dist.ProcessGroup, device: torch.device) -> signal.Signals | None:
        """The signal that stops the run, on every rank of `group` alike; None while there is none. 1 all-reduce."""
        found = torch.tensor(self._mine or self._others, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
        self._others = int(found)
        return signal.Signals(int(found)) if found else None

    @property
    def by_hand(self) -> bool:
        """Whether all have `agreed` on Ctrl-C. Schedulers send the others, and count the seconds from then on."""
        return self._others == signal.SIGINT

    def farewell(self, done: int) -> str:
        """One line for the user, on a rank where all have `agreed`; `done` steps are behind the run, and saved."""
        name = signal.Signals(self._others).name
        if done == 0:
            return f"stopped by {name} in the first step: nothing to save; the same command begins again"
        return f"stopped by {name} after step {done}: saved; the same command resumes"

    def leave(self) -> None:
        """Everything is saved, and the process about to end: signals would only keep it from ending well."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: signal.Signals) -> None:
        self._before[number] = signal.signal(number, lambda *_: None)  # the thread reads it

    def _forget(self) -> None:
        """In a fork, such as a writer of a checkpoint, that a terminal or scheduler signals with all others."""
        if self._before:
            signal.set_wakeup_fd(-1)
            self.leave()

    def _read(self) -> None:
        while True:
            try:
                received = self._receiving.recv(1)
            except TimeoutError:
                self._listen()
                continue
            if not received:
                return
            with suppress(ValueError):
                self._heed(signal.Signals(received[0]))

    def _heed(self, number: signal.Signals) -> None:
        if number not in SIGNALS or signal.getsignal(number) is signal.SIG_IGN:
            return
        if not self._begun:
            _say(f"stopped by {number.name} before its first step; the same command begins again")
            leave_exit_code(REQUEUE_EXIT)
            os._exit(REQUEUE_EXIT)
        if not self._mine:
            self._mine, self._since = number, time.monotonic()
            _say(f"{number.name}: stopping as soon as the state can be saved; again: at once")
            if self._store is not None:
                with suppress(RuntimeError):  # the rank that has the store may have ended
                    self._store.set(_KEY, str(int(number)))
        elif time.monotonic() - self._since > _SAME:
            _say(f"{number.name}: ended at once; the same command goes on from the last checkpoint")
            os._exit(128 + number)

    def _listen(self) -> None:
        if self._store is not None and not self.requested:
            with suppress(RuntimeError):
                if self._store.check([_KEY]):
                    self._others = int(self._store.get(_KEY))


def _say(line: str) -> None:
    """Once for a run whose ranks have all got the signal."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
