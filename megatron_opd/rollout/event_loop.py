"""`EventLoopThread`: an event loop of its own thread, so that responses are drawn while the caller trains."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class EventLoopThread:
    """Runs coroutines in a thread that `close` ends. Coroutines of all calls share one loop, and its connections."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        # A daemon: a process that ends without `close` is not held up.
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Start a coroutine; `wait` for its result. Cancelling the future cancels the coroutine."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def wait(self, future: Future[Result]) -> Result:
        """What a submitted coroutine returns or raises. Ctrl-C cancels it."""
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine to its end."""
        return self.wait(self.submit(coroutine))

    def cancel(self) -> None:
        """Cancel everything that runs and wait until it has ended."""
        self.run(_cancel_the_others())

    def close(self) -> None:
        """Cancel what still runs and end the thread; nothing can be run any more."""
        self.cancel()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_the_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
