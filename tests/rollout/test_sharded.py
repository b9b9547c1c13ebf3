"""Replicas share what they draw, and what goes wrong."""

from collections.abc import Sequence

import pytest
import torch.distributed as dist

from megatron_opd.data.prompts import Prompt
from megatron_opd.data.rollouts import Rollout
from megatron_opd.errors import UserError
from megatron_opd.rollout.sampling import Sampling
from megatron_opd.rollout.sharded import generate_sharded
from tests.gloo_pool import GlooPools
from tests.rollout.models import PROMPTS


class FailsOnOneRank:
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, weight_version: int) -> list[Rollout]:
        if dist.get_rank() == 1:
            raise UserError("all servers are dead")
        return []


def error_of_one_replica() -> str:
    group = dist.group.WORLD
    assert group is not None
    with pytest.raises(UserError) as caught:
        generate_sharded(
            FailsOnOneRank(), PROMPTS, Sampling(max_new_tokens=1, seed=0), weight_version=0, group=group
        )
    return str(caught.value)


def test_every_replica_ends_with_the_mistake_of_one(gloo: GlooPools) -> None:
    assert gloo(2, error_of_one_replica) == ["all servers are dead"] * 2
