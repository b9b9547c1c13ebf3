"""Weights in buckets to servers that take each into their running model, between a beginning and an end.

SGLang 0.5.21 and newer wants the two around all buckets together.
"""

from collections.abc import Callable, Sequence

import torch.distributed as dist

from megatron_opd.weight_sync.transport import Ask, Bucket, Outgoing, Trouble, troubles_of

Give = Callable[[Bucket, Sequence[str]], dict[str, Trouble]]
"""`give(bucket, urls)`: the servers at `urls` load the tensors; says which did not."""


def send_buckets(weights: Outgoing, ask: Ask, urls: Sequence[str], give: Give) -> dict[str, Trouble]:
    """On rank 0 `give` every bucket to all servers that took those before it; returns who did not take all, and why.

    Collective over the model's ranks, see `Outgoing.buckets`; other ranks return nothing.
    """
    buckets = weights.buckets()
    troubles: dict[str, Trouble] = {}
    try:
        if dist.get_rank() == 0:
            troubles = _begin(ask, urls)
            began = [url for url in urls if url not in troubles]
            for bucket in buckets:
                if taking := [url for url in urls if url not in troubles]:
                    troubles = give(bucket, taking) | troubles
            # Also where a bucket failed, so that the next update can begin.
            troubles = troubles_of(ask("/end_weight_update", {url: {} for url in began})) | troubles
    finally:
        for _ in buckets:  # the other ranks take part in the export; after a failure so does rank 0
            pass
    return troubles


def _begin(ask: Ask, urls: Sequence[str]) -> dict[str, Trouble]:
    body = {"selector": "all"}
    refusing = troubles_of(ask("/begin_weight_update", dict.fromkeys(urls, body)))
    if not refusing:
        return {}
    # A trainer that was killed in the middle of an update has not ended it.
    ask("/end_weight_update", {url: {} for url in refusing})
    return troubles_of(ask("/begin_weight_update", dict.fromkeys(refusing, body)))
