"""`Phases`: which part of a step this rank is in, told by the loop, and read by whoever watches it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

ROLLOUT, TEACHER, STEP, SYNC, EVALUATION, SAVE = "rollout", "teacher", "step", "sync", "evaluation", "save"
ORDERS = "orders"  # a rank that only teaches waits for the student


class Phases:
    """`with phases(ROLLOUT):` around a part of the loop. One that is inside another counts as part of that."""

    def __init__(self) -> None:
        self.now = self.last = ""  # the phase that goes on, empty between phases; the one that was begun last
        self.entered = 0  # how many phases there were: tells one from the next of the same name
        self.seconds: dict[str, float] = {}  # that each took when it was last

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Inside, the phase is `name`; afterwards `seconds[name]` is how long it took."""
        if self.now:
            yield
            return
        began = time.perf_counter()
        self.entered += 1
        self.now = self.last = name
        try:
            yield
        finally:
            self.now = ""
            self.seconds[name] = time.perf_counter() - began
