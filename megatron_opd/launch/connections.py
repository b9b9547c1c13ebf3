"""Whether ranks reach each other, and how fast: a sum over all, and a message both ways between pairs.

`python -m megatron_opd.launch.connections gloo|nccl FILE` is one rank of those that `doctor` starts on this machine;
rank 0 writes what was measured to FILE. Ranks that something else has started call `measure` themselves.
"""

import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.launch.check import NOTE, OK, Check
from megatron_opd.launch.worker import end_with_launcher

TIMEOUT = timedelta(seconds=60)
MESSAGE_BYTES = {"gloo": 16 << 20, "nccl": 256 << 20}
REPEATS = 3  # the best of them counts
PING_PONGS = 10
LINES = 6  # pairs of nodes that are listed one by one; of more, the slowest are
SLOWEST = 3
SLOW = 0.5  # of the median speed: a pair below it deserves a remark
INTERFACE = {
    "gloo": "GLOO_SOCKET_IFNAME",
    "nccl": "NCCL_SOCKET_IFNAME, NCCL_IB_HCA (NCCL_DEBUG=INFO says what it took)",
}
"""Variables that choose the network of a backend."""


@dataclass(frozen=True)
class Link:
    """A pair of ranks: GB/s each way while both send, and microseconds until a small message arrives."""

    ends: str
    speed: float
    latency: float
    within: bool  # a node


@dataclass(frozen=True)
class Measured:
    """What ranks found out together. `speed` is the all-reduce's bus bandwidth in GB/s."""

    right: bool
    ranks: int
    speed: float
    links: list[Link]


def this_node() -> str:
    """The name of this machine, as SLURM has it if it started this process."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def device_of(backend: str, local_rank: int) -> torch.device:
    """Where a rank's messages are; a GPU is made the current one."""
    if backend != "nccl":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def measure(nodes: Sequence[str], backend: str, device: torch.device) -> Measured:
    """Measure among all ranks of WORLD; `nodes` has the node of every rank. The same on every rank.

    A sum over all; then the first rank of every node with that of every other, as many pairs at once as there are;
    with the next rank of its own node too. Collective over WORLD.
    """
    mine = dist.get_rank()
    total = torch.tensor([float(mine + 1)], device=device)
    dist.all_reduce(total)
    size = len(nodes)
    message = torch.full((MESSAGE_BYTES[backend] // 4,), float(mine), device=device)
    seconds = _best(lambda: dist.all_reduce(message), device)
    links = []
    for pairs in [*_within_nodes(nodes), *_between_nodes(nodes)]:
        dist.barrier()
        pair = next((pair for pair in pairs if mine in pair), None)
        if pair is not None:
            links.append(_link(pair, nodes, mine, message, device))
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, (total.item() == size * (size + 1) / 2, seconds, links))
    firsts = {
        link.ends: link for _, _, found in gathered for link in found
    }  # both ends have it: the second's stays
    slowest = max(taken for _, taken, _ in gathered)
    speed = 2 * (size - 1) / size * message.nbytes / slowest / 1e9
    return Measured(all(right for right, _, _ in gathered), size, speed, list(firsts.values()))


def checks_of(measured: Measured, backend: str) -> Iterator[Check]:
    """The lines of the report."""
    speed = f", {measured.speed:.2f} GB/s" if measured.ranks > 1 else ""
    yield Check(f"{backend} all-reduce", f"right on {measured.ranks} processes{speed}")
    links = sorted(measured.links, key=lambda link: link.speed)
    if not links:
        return
    between = [link.speed for link in links if not link.within]
    median = statistics.median(between or [0.0])
    for link in links if len(links) <= LINES else links[:SLOWEST]:
        slow = not link.within and link.speed < SLOW * median
        yield Check(
            f"{backend} {link.ends}",
            f"{link.speed:.2f} GB/s each way, {link.latency:.0f} µs",
            NOTE if slow else OK,
            f"the median is {median:.2f} GB/s: see its cables, and {INTERFACE[backend]}" if slow else "",
        )
    if len(links) > LINES:
        yield Check(
            f"{backend}, {len(links)} pairs", f"{median:.2f} GB/s in the median, the slowest are above"
        )


def _within_nodes(nodes: Sequence[str]) -> list[list[tuple[int, int]]]:
    """One round: the first two ranks of every node that has two."""
    members: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        members.setdefault(node, []).append(rank)
    pairs = [(ranks[0], ranks[1]) for ranks in members.values() if len(ranks) > 1]
    return [pairs] if pairs else []


def _between_nodes(nodes: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Rounds in which the first ranks of all nodes meet, everyone everyone once (the circle of a tournament)."""
    firsts: list[int | None] = [nodes.index(node) for node in dict.fromkeys(nodes)]
    if len(firsts) % 2:
        firsts.append(None)
    rounds = []
    for _ in range(len(firsts) - 1):
        meetings = zip(firsts[: len(firsts) // 2], reversed(firsts[len(firsts) // 2 :]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in meetings if a is not None and b is not None])
        firsts = [firsts[0], firsts[-1], *firsts[1:-1]]
    return rounds


def _link(
    pair: tuple[int, int], nodes: Sequence[str], mine: int, message: Tensor, device: torch.device
) -> Link:
    """Both ranks of the pair call it."""
    peer = pair[1] if mine == pair[0] else pair[0]
    message = torch.full_like(message, float(mine))
    received, small = torch.empty_like(message), torch.zeros(1, device=device)

    def exchange() -> None:
        both = [dist.P2POp(dist.isend, message, peer), dist.P2POp(dist.irecv, received, peer)]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    def ping_pong() -> None:
        for _ in range(PING_PONGS):
            first, second = (dist.send, dist.recv) if mine == pair[0] else (dist.recv, dist.send)
            first(small, peer)
            second(small, peer)

    seconds = _best(exchange, device)
    if not bool((received == peer).all()):
        raise RuntimeError(f"rank {mine} got something else from rank {peer} than it sent")
    latency = _best(ping_pong, device) / (2 * PING_PONGS)
    here, there = nodes[pair[0]], nodes[pair[1]]
    ends = f"{here} - {there}" if here != there else f"within {here}"
    return Link(ends, message.nbytes / seconds / 1e9, latency * 1e6, here == there)


def _best(act: Callable[[], object], device: torch.device) -> float:
    """Seconds that `act` takes, at best, after it has been done once."""
    times = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def main(backend: str, file: str) -> int:
    """Joins the ranks that the environment names and measures; 0 if the sum is right, else 1."""
    end_with_launcher()
    device = device_of(backend, int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=TIMEOUT)
    measured = measure([this_node()] * dist.get_world_size(), backend, device)
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(asdict(measured)))
    dist.destroy_process_group()
    return 0 if measured.right else 1


def read_measured(file: Path) -> Measured:
    """What rank 0 wrote."""
    found = json.loads(file.read_text())
    return Measured(**{**found, "links": [Link(**link) for link in found["links"]]})


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
