"""The pool of gloo workers: results by rank, exceptions with their rank, and no hang."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.gloo_pool import GlooPools


def sum_of_ranks(factor: float, *, offset: int = 0) -> tuple[int, str, int, torch.Tensor]:
    total = torch.tensor([float(dist.get_rank()) + offset])
    dist.all_reduce(total)
    return dist.get_rank(), os.environ["WORLD_SIZE"], torch.get_num_threads(), total * factor


def pid() -> int:
    return os.getpid()


def subgroups() -> tuple[int, int]:
    """Distinct groups of this call, and of all calls."""
    made = {dist.new_group([rank]) for rank in range(2) for _ in range(3)}
    return len(made - {dist.GroupMember.NON_GROUP_MEMBER}), len(dist.distributed_c10d._world.pg_map)


def fail_on(rank: int) -> None:
    if rank in (dist.get_rank(), -1):
        raise KeyError(f"broken on {dist.get_rank()}")
    dist.barrier()


def die(rank: int) -> None:
    if rank == dist.get_rank():
        os._exit(3)
    dist.barrier()


def hang(rank: int) -> None:
    if rank == dist.get_rank():
        time.sleep(3600)
    dist.barrier()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_by_rank(gloo: GlooPools, world_size: int) -> None:
    results = gloo(world_size, sum_of_ranks, 2.0, offset=1)
    total = 2.0 * sum(range(1, world_size + 1))
    assert [r[0] for r in results] == list(range(world_size))
    assert all(r[1] == str(world_size) and r[2] == 1 and r[3].item() == total for r in results)


def test_workers_persist_with_their_groups(gloo: GlooPools) -> None:
    assert gloo(2, pid) == gloo(2, pid)
    first = gloo(2, subgroups)
    assert first[0][0] == 3 and gloo(2, subgroups) == first


def test_exception_names_the_rank_and_pool_recovers() -> None:
    pools = GlooPools()
    try:
        with pytest.raises(KeyError, match="broken on 1") as caught:
            pools(2, fail_on, 1)
        assert "raised on rank 1" in caught.value.__notes__[0] and "fail_on" in caught.value.__notes__[0]
        before = pools(2, pid)
        with pytest.raises(KeyError, match="broken on"):
            pools(2, fail_on, -1)
        assert pools(2, pid) == before, "a failure of every rank leaves nobody waiting, so the pool stays"
        with pytest.raises(RuntimeError, match=r"rank 0 died \(exit code 3\)"):
            pools(2, die, 0)
    finally:
        pools.close()


def test_timeout_kills_the_pool() -> None:
    pools = GlooPools()
    try:
        pids = pools(2, pid)
        with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] did not answer"):
            pools(2, hang, 0, timeout=1.0)
        for worker in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(worker, 0)
        assert len(pools(2, pid)) == 2
    finally:
        pools.close()
