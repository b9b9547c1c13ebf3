"""Weights through a torch process group of rank 0 and all servers: gloo between CPUs, NCCL between GPUs.

The group is made for each push and destroyed after it, so that a server which was restarted simply joins the next one.
Run here with gloo; NCCL takes the same path, with tensors that stay on the GPU, and needs rank 0 and the servers to use
different GPUs.
"""

import secrets
import socket
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from itertools import accumulate
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from megatron_opd.rollout.replicas import BadReply
from megatron_opd.weight_sync.buckets import send_buckets
from megatron_opd.weight_sync.transport import (
    Abandoned,
    Ask,
    Bucket,
    Outgoing,
    Trouble,
    shards_of,
    troubles_of,
)

# For all to join, and for a bucket to arrive. A server that dies is noticed at once, except while the group is made.
GROUP_TIMEOUT = timedelta(seconds=60)


class DistributedTransport:
    """Broadcasts the buckets from rank 0, whose tensors are on `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def send(self, weights: Outgoing, ask: Ask, urls: Sequence[str]) -> dict[str, Trouble]:
        """See `Transport`. When one server fails, the group has failed, and none of them gets the weights."""
        if not urls:
            return send_buckets(weights, ask, urls, lambda bucket, taking: {})
        with ThreadPoolExecutor(1, initializer=self._use_device) as thread:
            group = _Group(self._device, ask, urls, thread)
            try:
                return send_buckets(weights, ask, urls, group.give)
            finally:
                group.destroy()

    def _use_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)


class _Group:
    """Rank 0 and the processes of the servers at `urls`; what rank 0 does while servers do theirs runs in `thread`."""

    def __init__(
        self, device: torch.device, ask: Ask, urls: Sequence[str], thread: ThreadPoolExecutor
    ) -> None:
        self._device, self._ask, self._urls, self._thread = device, ask, list(urls), thread
        self._backend = "nccl" if device.type == "cuda" else "gloo"
        self._name = f"weights-{secrets.token_hex(4)}"
        self._group: dist.ProcessGroup | None = None

    def give(self, bucket: Bucket, taking: Sequence[str]) -> dict[str, Trouble]:
        """Broadcast a bucket to all servers; the first makes the group."""
        if self._group is None:
            self._urls = list(taking)
            try:
                troubles = self._join()
            except (OSError, dist.DistError) as error:  # an unknown host name, no port to listen at
                troubles = dict.fromkeys(self._urls, BadReply(f"no process group: {error}"))
            if troubles:
                return troubles
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": self._name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        flat = torch.cat([tensor.to(self._device).reshape(-1).view(torch.uint8) for _, tensor in bucket])
        sending = self._thread.submit(self._broadcast, flat)
        troubles = troubles_of(self._ask("/update_weights_from_distributed", dict.fromkeys(taking, body)))
        if troubles:
            self._dismiss_servers()  # which ends a broadcast that one of them has not joined
        return self._all_or_none(troubles, sending)

    def destroy(self) -> None:
        """End the group here and in the servers."""
        if self._group is not None:
            self._dismiss_servers()
            self._leave()

    def _leave(self) -> None:
        group, self._group = self._group, None
        dist.destroy_process_group(group)

    def _dismiss_servers(self) -> None:
        body = {"group_name": self._name}
        self._ask("/destroy_weights_update_group", dict.fromkeys(self._urls, body))

    def _join(self) -> dict[str, Trouble]:
        """Make the group: rank 0 first, then each server's processes."""
        shards = shards_of(self._ask, self._urls)
        silent = [url for url in self._urls if url not in shards]
        if silent:
            return self._all_or_none(dict.fromkeys(silent, BadReply("/server_info does not say tp_size")))
        address, world_size = own_address(self._urls), 1 + sum(shards.values())
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=GROUP_TIMEOUT)
        settings = {
            "master_address": address,
            "master_port": store.port,
            "world_size": world_size,
            "group_name": self._name,
            "backend": self._backend,
        }
        offsets = accumulate((shards[url] for url in self._urls), initial=1)
        bodies = {
            url: {**settings, "rank_offset": offset} for url, offset in zip(self._urls, offsets, strict=False)
        }
        # Servers that wait for one that died are freed when the store ends: the thread holds the last reference.
        joining = self._thread.submit(self._make, [store], world_size)
        del store
        troubles = troubles_of(self._ask("/init_weights_update_group", bodies))
        return self._all_or_none(troubles, joining)

    def _make(self, stores: list[dist.TCPStore], world_size: int) -> None:
        """Join as rank 0, by the same function of torch as SGLang: no public one goes beyond the trainer's WORLD."""
        group, _ = distributed_c10d._new_process_group_helper(
            world_size,
            0,
            [],
            dist.Backend(self._backend),
            dist.PrefixStore(self._name, stores.pop()),
            group_name=distributed_c10d.GroupName(self._name),
            timeout=GROUP_TIMEOUT,
        )
        distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
        self._group = group

    def _broadcast(self, flat: Tensor) -> None:
        assert self._group is not None
        try:
            dist.broadcast(flat, group=self._group, group_src=0)
            if flat.is_cuda:
                torch.cuda.synchronize(flat.device)
            return
        except RuntimeError as error:
            failure = str(error)
        # Servers still wait for what the dead one kept from them: they notice that rank 0 has gone. The error holds the
        # group by its traceback, so it is raised anew.
        self._leave()
        raise RuntimeError(failure)

    def _all_or_none(
        self, troubles: dict[str, Trouble], ours: "Future[None] | None" = None
    ) -> dict[str, Trouble]:
        """The servers' troubles, and all others abandoned if there is one, or if rank 0's part has failed."""
        failure = None if ours is None else ours.exception()
        if failure is not None and not isinstance(failure, RuntimeError):
            raise failure
        if not troubles and failure is None:
            return {}
        why = f"{next(iter(troubles))}: {next(iter(troubles.values()))}" if troubles else str(failure)
        return dict.fromkeys(self._urls, Abandoned(f"the group failed ({why[:200]})")) | troubles


def own_address(urls: Sequence[str]) -> str:
    """The address of this machine that servers at these URLs reach it at: loopback only where all are here."""
    addresses = []
    for url in urls:
        parts = urlsplit(url)
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)
        family, kind, _, _, target = found[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # of a datagram: only looks up the route
            addresses.append(str(probe.getsockname()[0]))
    return next((each for each in addresses if not each.startswith(("127.", "::1"))), addresses[0])
