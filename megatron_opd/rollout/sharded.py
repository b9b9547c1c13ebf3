"""Rollouts of all replicas: each generates its share of the prompts, all get the whole.

Decoding needs no context parallelism, so its ranks are replicas here like the data-parallel ones.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch.distributed as dist

from megatron_opd.data.prompts import Prompt
from megatron_opd.data.rollouts import Rollout
from megatron_opd.errors import UserError
from megatron_opd.rollout.sampling import Sampling


class RolloutsStopped(Exception):
    """The run is asked to stop, and its rollouts are cut off."""


def never() -> bool:
    """Rollouts are drawn to their end."""
    return False


class RolloutEngine(Protocol):
    """What draws responses: `LocalEngine` or `SGLangEngine`."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, weight_version: int) -> list[Rollout]:
        """`sampling.n` responses to each prompt, in prompt order, then sample order, on every rank of a replica.

        Raises UserError, on all ranks of the replica alike, when there is something that the user can mend, and
        RolloutsStopped when the run is asked to stop.
        """
        ...


def generate_sharded(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    weight_version: int,
    group: dist.ProcessGroup,
) -> list[Rollout]:
    """The rollouts of `prompts` in prompt order, the same list on every rank; `group` has the replicas.

    See `gathered` for collectives and errors.
    """
    mine = share(prompts, group)
    return gathered(lambda: engine.generate(mine, sampling, weight_version), group)


def share(prompts: Sequence[Prompt], group: dist.ProcessGroup) -> Sequence[Prompt]:
    """The prompts that this replica draws responses to."""
    replicas, replica = group.size(), group.rank()
    return prompts[len(prompts) * replica // replicas : len(prompts) * (replica + 1) // replicas]


def gathered(draw: Callable[[], list[Rollout]], group: dist.ProcessGroup) -> list[Rollout]:
    """What `draw` returns on all replicas, the same list on every rank.

    Every rank gets all rollouts so that all pack the same microbatches without asking each other. 1 all-gather of
    token ids and log-probs (a few kilobytes a rollout, and 4 bytes a kept id where these are recorded), none with one
    replica. What one replica raises as UserError or RolloutsStopped is raised on all.
    """
    mine: list[Rollout] | UserError | RolloutsStopped
    try:
        mine = draw()
    except (UserError, RolloutsStopped) as error:
        mine = error
    shares: list[list[Rollout] | UserError | RolloutsStopped] = [mine] * group.size()
    if group.size() > 1:
        dist.all_gather_object(shares, mine, group=group)
    rollouts: list[Rollout] = []
    for share in shares:
        if isinstance(share, Exception):
            raise share
        rollouts += share
    return rollouts
