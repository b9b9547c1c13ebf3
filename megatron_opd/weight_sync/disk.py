"""Weights through the file system: the student is exported as a Hugging Face folder that the servers load.

Works wherever trainer and servers see the same files, with any number of servers.
"""

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_opd.weight_sync.transport import Ask, Outgoing, Trouble, troubles_of


class DiskTransport:
    """Exports to folders in `folder`, named by version."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def send(self, weights: Outgoing, ask: Ask, urls: Sequence[str]) -> dict[str, Trouble]:
        """See `Transport`."""
        export = self._folder / weights.version
        weights.export(export)
        if dist.get_rank() > 0:
            return {}
        body = {"model_path": str(export.absolute()), "flush_cache": False}
        return troubles_of(ask("/update_weights_from_disk", dict.fromkeys(urls, body)))
