"""Rollouts of all replicas: each generates its share of the prompts, all get the whole.

Decoding needs no context parallelism, so its ranks are replicas here like the data-parallel ones.
"""

from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist

from megatron_opd.data.prompts import Prompt
from megatron_opd.data.rollouts import Rollout
from megatron_opd.errors import UserError
from megatron_opd.rollout.sampling import Sampling


class RolloutEngine(Protocol):
    """What draws responses: `LocalEngine` or `SGLangEngine`."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, weight_version: int) -> list[Rollout]:
        """`sampling.n` responses to each prompt, in prompt order, then sample order, on every rank of a replica.

        Raises UserError, on all ranks of the replica alike, when there is something that the user can mend.
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

    Every rank gets all of them so that all pack the same microbatches without asking each other. 1 all-gather of
    token ids and log-probs (a few kilobytes a rollout, and 4 bytes a kept id where these are recorded), none with one
    replica. What one replica raises as UserError is raised on all.
    """
    replicas, replica = group.size(), group.rank()
    bounds = [len(prompts) * i // replicas for i in range(replicas + 1)]
    mine: list[Rollout] | UserError
    try:
        mine = engine.generate(prompts[bounds[replica] : bounds[replica + 1]], sampling, weight_version)
    except UserError as error:
        mine = error
    shares: list[list[Rollout] | UserError] = [mine] * replicas
    if replicas > 1:
        dist.all_gather_object(shares, mine, group=group)
    rollouts: list[Rollout] = []
    for share in shares:
        if isinstance(share, UserError):
            raise share
        rollouts += share
    return rollouts
