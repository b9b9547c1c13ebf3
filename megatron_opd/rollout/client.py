"""`SGLangClient`: what the rollouts' and the teacher's way to SGLang servers share, an event loop with its connections.

The loop has a thread of its own, so that servers work while the caller does something else.
"""

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from megatron_opd.rollout.replicas import Body, Replicas

Result = TypeVar("Result")


class SGLangClient:
    """Asks the servers of `connect`; until it is called there are none."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._servers: Replicas | None = None

    def connect(self, urls: Sequence[str], **options: Any) -> None:
        """Use these servers from now on; `options` are those of `Replicas`."""

        async def make() -> Replicas:
            return Replicas(urls, **options)

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            # A daemon: a process that ends without `close` is not held up.
            self._thread = threading.Thread(target=self._loop.run_forever, name="sglang", daemon=True)
            self._thread.start()
        self._servers = self._run(make())

    def close(self) -> None:
        """Give up what is being asked, close the connections and end the thread; the servers stay."""
        if self._loop is None:
            return
        assert self._thread is not None
        self._run(_cancel_the_others())
        self._run(self._connected.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = self._thread = self._servers = None

    def ask(self, path: str, bodies: Mapping[str, Body], timeout: float | None = None) -> dict[str, Any]:
        """URL -> what that server answers to a POST of its body (None: to a GET), or the BadReply or UserError.

        All of `bodies` are asked at the same time, and have `timeout` seconds (None: `outage_timeout`).
        """
        return self._run(self._connected.fetch_each(path, bodies, timeout))

    def ask_all(self, path: str, body: Body = None) -> dict[str, Any]:
        """The same of all servers, with one body."""
        return self._run(self._connected.fetch_all(path, body))

    @property
    def _connected(self) -> Replicas:
        assert self._servers is not None, "connect comes first"
        return self._servers

    def _start(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Start a coroutine; `_wait` for its result. Cancelling the future cancels the coroutine."""
        assert self._loop is not None, "connect comes first"
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _wait(self, future: Future[Result]) -> Result:
        """What a started coroutine returns or raises. Ctrl-C cancels it."""
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine to its end."""
        return self._wait(self._start(coroutine))


async def _cancel_the_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
