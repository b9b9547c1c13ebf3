"""Persistent gloo worker processes, so that a distributed test costs milliseconds and not a process start.

`GlooPools` keeps one pool per world size and starts it when it is first asked for. A test calls it through
the `gloo` fixture: `results = gloo(world_size, fn, *args, **kwargs)` runs the module-level function `fn` on
every rank of an initialised gloo WORLD group and returns what each rank returned, by rank.

Workers keep their Python state between calls: seed what you draw. They keep the process groups that `fn` makes,
too, for the next call that asks for the same ranks. A call that fails on some ranks only, or that runs out of
time, ends its pool; the next call starts a new one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from tests.forked import forking

HOST = "127.0.0.1"
DEFAULT_TIMEOUT = 120.0  # seconds one call may take
GRACE = 5.0  # seconds the other ranks get to answer once a rank has failed


class GlooPools:
    """The pools of one pytest session, by world size."""

    def __init__(self) -> None:
        self._pools: dict[int, _Pool] = {}

    def __call__(
        self,
        world_size: int,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float = DEFAULT_TIMEOUT,
        **kwargs: Any,
    ) -> list[Any]:
        """Runs `fn(*args, **kwargs)` on every rank and returns the results by rank.

        The first exception of any rank is raised here, with the rank and its traceback as a note.
        TimeoutError after `timeout` seconds: the stacks of the silent ranks go to stderr and the pool is
        killed.
        """
        if world_size not in self._pools:
            self._pools[world_size] = _Pool(world_size)
        healthy = False
        try:
            outcomes = self._pools[world_size].call(fn, args, kwargs, timeout)
            failures = [outcome for outcome in outcomes if isinstance(outcome, _Failure)]
            healthy = len(failures) in (0, world_size)  # else some rank may still wait for another
        finally:
            if not healthy:
                self._pools.pop(world_size).kill()
        if failures:
            raise min(failures, key=lambda failure: failure.when).as_exception()
        return outcomes

    def close(self) -> None:
        """Ends every worker."""
        while self._pools:
            self._pools.popitem()[1].kill()


class _Failure:
    """An exception of one rank on its way to the test."""

    def __init__(self, rank: int, error: BaseException, text: str) -> None:
        self.rank, self.text, self.when = rank, text, time.time()
        try:
            self.payload = pickle.dumps(error)
            pickle.loads(self.payload)
        except Exception:  # an exception type that does not survive pickling
            self.payload = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))

    def as_exception(self) -> BaseException:
        error: BaseException = pickle.loads(self.payload)
        error.add_note(f"raised on rank {self.rank}:\n{self.text}")
        return error


class _Pool:
    """`world_size` worker processes that share one gloo WORLD group."""

    def __init__(self, world_size: int) -> None:
        # The store lives here and picks a free port itself, so two sessions on a machine cannot collide.
        self._store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        context = forking()
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            # No daemon: megatron-core's checkpoint writer starts a process of its own.
            process = context.Process(target=_worker, args=(rank, world_size, self._store.port, theirs))
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def call(self, fn: Callable[..., Any], args: Any, kwargs: Any, timeout: float) -> list[Any]:
        job = pickle.dumps((sys.path, pickle.dumps((fn, args, kwargs))))
        for connection in self._connections:
            connection.send_bytes(job)
        outcomes: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        failed = False
        while len(outcomes) < len(self._connections):
            waiting = [rank for rank in range(len(self._connections)) if rank not in outcomes]
            left = max(0.0, deadline - time.monotonic())
            ready = wait([self._connections[rank] for rank in waiting], timeout=left)
            if not ready and not failed:
                self._dump_stacks(waiting)
                raise TimeoutError(f"ranks {waiting} did not answer in {timeout:g} s")
            if not ready:  # left waiting in a collective by the rank that failed
                break
            for rank in (rank for rank in waiting if self._connections[rank] in ready):
                outcomes[rank] = self._receive(rank)
                if isinstance(outcomes[rank], _Failure) and not failed:
                    failed, deadline = True, min(deadline, time.monotonic() + GRACE)
        return [outcomes.get(rank) for rank in range(len(self._connections))]

    def _receive(self, rank: int) -> Any:
        try:
            return pickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, ConnectionError):
            self._processes[rank].join(GRACE)
            code = self._processes[rank].exitcode
            raise RuntimeError(f"the process of rank {rank} died (exit code {code})") from None

    def _dump_stacks(self, ranks: list[int]) -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)

    def kill(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # with whatever the worker has started
            process.kill()  # it may not have a process group of its own yet
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            connection.close()


def _worker(rank: int, world_size: int, port: int, connection: Connection) -> None:
    os.setpgid(0, 0)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
    }
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the test session's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    store = dist.TCPStore(HOST, port, is_master=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=30)
    )
    groups = _Groups()
    dist.new_group = dist.distributed_c10d.new_group = groups.new_group
    while True:
        path, job = pickle.loads(connection.recv_bytes())
        sys.path[:] = path  # pytest adds the folders of the test modules as it collects them
        connection.send_bytes(_run(rank, job, groups))


class _Groups:
    """Process groups for call after call: within a call all are distinct, as torch makes them.

    Each costs connections between all its ranks and three threads. Objects in a circle that Python's collector
    cannot see (megatron-core's DDP wrapper, through autograd's hooks) would keep those threads although the group is
    destroyed: thousands of them in a session.
    """

    def __init__(self) -> None:
        self._make = dist.new_group
        self._kept: dict[Any, list[Any]] = {}
        self._used: Counter[Any] = Counter()

    def new_group(self, ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `torch.distributed.new_group`."""
        key = (None if ranks is None else tuple(ranks), args, tuple(sorted(kwargs.items())))
        kept, used = self._kept.setdefault(key, []), self._used[key]
        if used == len(kept):
            kept.append(self._make(ranks, *args, **kwargs))
        self._used[key] += 1
        return kept[used]

    def end_call(self, *, healthy: bool) -> None:
        """Give the groups free for the next call; after a failure some may be out of step, so none is used again."""
        self._used.clear()
        if not healthy:
            for group in (group for kept in self._kept.values() for group in kept):
                dist.destroy_process_group(group)
            self._kept.clear()


def _run(rank: int, job: bytes, groups: _Groups) -> bytes:
    healthy = False
    try:
        fn, args, kwargs = pickle.loads(job)
        answer = pickle.dumps(fn(*args, **kwargs))
        healthy = True
        return answer
    except BaseException as error:
        return pickle.dumps(_Failure(rank, error, traceback.format_exc()))
    finally:
        groups.end_call(healthy=healthy)


def _end_with_parent() -> None:
    """Leaves no worker behind, even one that waits in a collective, when the test session is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
