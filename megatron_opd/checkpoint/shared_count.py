"""How far the processes of a conversion are together: each adds what it has moved, any can show the sum."""

from collections.abc import Callable

import torch.distributed as dist

Progress = Callable[[int, int], object]
"""`progress(done, total)`: bytes of all processes together."""

_KEY = "megatron_opd/moved_bytes"


class SharedCount:
    """Bytes that the processes of `group` (None: this one) have moved, of `total` altogether.

    The sum lies in the group's key-value store, so that adding to it is no collective. Made by every process before
    the first collective of what is counted, `add` comes after it; one at a time in a group.
    """

    def __init__(self, total: int, group: dist.ProcessGroup | None, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._store = dist.HashStore() if group is None else group.get_group_store()
        if group is None or group.rank() == 0:
            self._store.set(_KEY, "0")

    def add(self, nbytes: int) -> None:
        """This process has moved so many bytes more."""
        done = self._store.add(_KEY, nbytes)
        if self._progress is not None and done < self._total:
            self._progress(done, self._total)

    def finish(self) -> None:
        """All processes are done, as a collective has told."""
        if self._progress is not None:
            self._progress(self._total, self._total)
