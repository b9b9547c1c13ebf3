"""How evenly the experts of the student were used in a step, for the log.

Shapes: L layers of the whole model, E experts of a layer.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_opd.models.gpt import GPT
from megatron_opd.models.router import Router


def take_router_metrics(chunks: Iterable[GPT], groups: ProcessGroupCollection) -> dict[str, float]:
    """Of the tokens trained on since the last call (padding left out), equal on all ranks and in every layout.

    `moe/load_balancing_loss`: E * sum over experts of (share of the choices * mean probability), mean over layers; 1 is
    even. Of all these tokens together, while training balances each microbatch (`Router`).
    `moe/max_load`: choices of the busiest expert of any layer, relative to an even share.
    `moe/router_entropy`: mean over tokens and layers of the entropy of the router's probabilities, nats.

    Empty without experts and when nothing was trained on. Collective: 2 all-reduces of L * (2E + 1) numbers.
    """
    routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]
    if not routers:
        return {}
    config = routers[0].config
    usage = [router.take_usage() for router in routers]
    table = torch.zeros(config.num_layers, usage[0].numel(), dtype=torch.float64, device=usage[0].device)
    for router, row in zip(routers, usage, strict=True):
        table[router.layer_number - 1] = row
    for group in (groups.tp_dp_cp, groups.pp):
        dist.all_reduce(table, group=group)
    return _metrics(table, config.num_moe_experts, config.moe_router_topk)


def _metrics(table: Tensor, experts: int, topk: int) -> dict[str, float]:
    """`table` [L, 2E + 1] holds the counts, sums of probabilities and sum of entropies of each layer."""
    counts_LE, probs_LE, entropy_L = table[:, :experts], table[:, experts:-1], table[:, -1]
    tokens = float(counts_LE[0].sum()) / topk
    if tokens == 0:
        return {}
    share_LE = counts_LE / (tokens * topk)
    balance_L = experts * (share_LE * probs_LE / tokens).sum(1)
    return {
        "moe/load_balancing_loss": float(balance_L.mean()),
        "moe/max_load": float(share_LE.max()) * experts,
        "moe/router_entropy": float(entropy_L.mean()) / tokens,
    }
