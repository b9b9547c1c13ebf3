"""Rollouts of all replicas: each generates its share of the prompts, all get the whole.

Decoding needs no context parallelism, so its ranks are replicas here like the data-parallel ones.
"""

from collections.abc import Sequence

import torch.distributed as dist

from megatron_opd.data.prompts import Prompt
from megatron_opd.data.rollouts import Rollout
from megatron_opd.rollout.local import LocalEngine
from megatron_opd.rollout.sampling import Sampling


def generate_sharded(
    engine: LocalEngine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    weight_version: int,
    group: dist.ProcessGroup,
) -> list[Rollout]:
    """The rollouts of `prompts` in prompt order, the same list on every rank; `group` has the replicas.

    Every rank gets all of them so that all pack the same microbatches without asking each other. 1 all-gather of
    token ids and log-probs (a few kilobytes a rollout), none with one replica.
    """
    replicas, replica = group.size(), group.rank()
    bounds = [len(prompts) * i // replicas for i in range(replicas + 1)]
    mine = engine.generate(prompts[bounds[replica] : bounds[replica + 1]], sampling, weight_version)
    if replicas == 1:
        return mine
    shares: list[list[Rollout]] = [[] for _ in range(replicas)]
    dist.all_gather_object(shares, mine, group=group)
    return [rollout for share in shares for rollout in share]
