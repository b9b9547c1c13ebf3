"""Ranks that `srun` or another launcher started, for `megatron-opd doctor`: they meet, and rank 0 hears all of them.

They meet in a store that rank 0 keeps at MASTER_ADDR:MASTER_PORT, through which everything but the measurements goes:
so rank 0 can name the ranks that did not come, and what a failed connection was about.
"""

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_opd.errors import UserError
from megatron_opd.launch.check import MISSING, Check
from megatron_opd.launch.connections import (
    INTERFACE,
    TIMEOUT,
    Measured,
    checks_of,
    device_of,
    measure,
    this_node,
)

PATIENCE = timedelta(seconds=60)  # that ranks have to come
LEAVE = timedelta(minutes=10)  # that those who have come may take for their checks


@dataclass(frozen=True)
class Place:
    """Where a started process stands."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int


def place_of(environment: Mapping[str, str]) -> Place | None:
    """The place that a launcher, or else `srun`, has given this process; None for one that stands alone.

    Raises UserError for an incomplete one.
    """
    if "RANK" in environment:
        names = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if not environment.get(name)]
        if missing:
            raise UserError(
                f"{missing[0]}: not set, though RANK is: every started process needs {', '.join(names)}"
            )
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local = int(environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID") or rank)
        return Place(rank, size, local, environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return None
    job = f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
    return Place(
        int(environment["SLURM_PROCID"]),
        int(environment["SLURM_STEP_NUM_TASKS"]),
        int(environment["SLURM_LOCALID"]),
        environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        int(environment.get("MASTER_PORT") or 20000 + zlib.crc32(job.encode()) % 20000),
    )


def first_host(nodes: str) -> str:
    """The first of a list of hosts as SLURM writes it: `node[01-04,7]-ib,login` is node01-ib."""
    found = re.match(r"[^,\[]*(\[[^\]]*\][^,\[]*)*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", found.group() if found else nodes)


class Meeting:
    """The ranks of a `meeting`. All of them call the same methods in the same order."""

    def __init__(self, place: Place, store: dist.Store) -> None:
        self.place, self._store, self._asked = place, store, 0

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.place.rank == 0

    def gather(self, mine: Any) -> list[Any]:
        """What every rank says (as JSON has it), on rank 0; [] elsewhere. Raises UserError there for silent ranks."""
        self._asked += 1
        self._store.set(f"{self._asked}/{self.place.rank}", json.dumps(mine))
        if not self.leads:
            return []
        keys = [f"{self._asked}/{rank}" for rank in range(self.place.size)]
        patience = PATIENCE if self._asked == 1 else LEAVE
        try:
            self._store.wait(keys, patience)
        except dist.DistError:
            silent = [str(rank) for rank, key in enumerate(keys) if not self._store.check([key])]
            raise UserError(
                f"of {len(keys)} ranks {', '.join(silent)} did not come to {self.place.address}:{self.place.port} "
                f"within {patience.seconds} s: see what they print; a firewall between nodes stops them too"
            ) from None
        return [json.loads(self._store.get(key)) for key in keys]

    def tell(self, said: Any = None) -> Any:
        """What rank 0 says, on every rank."""
        self._asked += 1
        if self.leads:
            self._store.set(f"said/{self._asked}", json.dumps(said))
        try:
            return json.loads(self._store.get(f"said/{self._asked}"))
        except dist.DistError:
            raise UserError("rank 0 has ended before its report: see what it prints") from None

    def leave(self) -> None:
        """Rank 0 keeps the store until all others have come to this."""
        self._store.set(f"left/{self.place.rank}", "")
        if self.leads:
            with suppress(dist.DistError):  # of one that has died meanwhile
                self._store.wait([f"left/{rank}" for rank in range(self.place.size)], PATIENCE)

    def connections(self, backend: str) -> list[Check]:
        """What connections between the ranks are like, or what is wrong with them; of rank 0 it is the whole report."""
        nodes = self.tell(self.gather(this_node()))
        # NCCL's time-out is an exception with it, not the end of the process.
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
        measured: Measured | None = None
        trouble = ""
        try:
            device = device_of(backend, self.place.local_rank)
            dist.init_process_group(
                backend,
                store=dist.PrefixStore(backend, self._store),
                rank=self.place.rank,
                world_size=self.place.size,
                timeout=TIMEOUT,
            )
            measured = measure(nodes, backend, device)
        except (
            Exception
        ) as error:  # whatever a network or a driver comes up with is what we are here to report
            trouble = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if dist.is_initialized():
            dist.destroy_process_group()
        troubles = self.gather(trouble)
        failed = [f"rank {rank} on {nodes[rank]}: {text}" for rank, text in enumerate(troubles) if text]
        if measured is not None and measured.right and not failed:
            return list(checks_of(measured, backend))
        found = failed[0] if failed else "the sum over all ranks is wrong"
        remedy = f"open the nodes' firewalls to each other; name the interface that joins them: {INTERFACE[backend]}"
        return [Check(f"{backend} connections", found, MISSING, remedy)]


@contextmanager
def meeting(place: Place) -> Iterator[Meeting]:
    """`with meeting(place) as ranks:` the ranks have a store in common.

    Raises UserError on rank 0 when it cannot listen at its port, elsewhere when rank 0 cannot be reached.
    """
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun listens there already
    listens = place.rank == 0 and not agent
    try:
        store = dist.TCPStore(
            place.address, place.port, None, listens, wait_for_workers=False, timeout=PATIENCE
        )
    except dist.DistError as error:
        where = f"{place.address}:{place.port}"
        if listens:
            raise UserError(
                f"MASTER_PORT: rank 0 cannot listen at {where} ({_reason(error)}): is the port taken? give another"
            ) from None
        raise UserError(
            f"MASTER_ADDR: rank {place.rank} on {this_node()} cannot reach rank 0 at {where} ({_reason(error)}): "
            "name an address of rank 0's machine that the others reach, and open the port"
        ) from None
    store.set_timeout(LEAVE)
    yield Meeting(place, dist.PrefixStore("doctor", store))


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:160]
