"""The feed-forward part of a layer in decoding, on the training model's own parameters: dense, or experts.

Shapes: N tokens, H hidden size, K experts a token.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_opd.rollout.projection import Projection, project

FeedForward = Callable[[Tensor], Tensor]
"""[N, H] -> this tensor-parallel rank's addend [N, H] of the output."""


def read_feed_forward(mlp: Any, groups: ProcessGroupCollection, *, rows: int) -> FeedForward:
    """The layer's feed-forward part with the present weights; `rows` is how many tokens it will mostly be given.

    The tensor-parallel ranks deal all experts out among them, and those that other ranks train are fetched: replicas
    generate each at its own pace, so none can wait for another's tokens. Collective over `groups.ep` for a layer with
    experts: 2 all-gathers a local expert, none with one rank.
    """
    if not isinstance(mlp, MoELayer):
        return _GatedLinear(mlp.linear_fc1.weight, mlp.linear_fc2.weight, rows)
    local = mlp.experts.local_experts
    experts: dict[int, _GatedLinear] = {}
    for place, expert in enumerate(local):
        gate_and_up = _gather(expert.linear_fc1.weight.detach(), groups.ep)
        down = _gather(expert.linear_fc2.weight.detach(), groups.ep)
        for rank in range(groups.ep.size()):
            number = rank * len(local) + place
            if number % groups.tp.size() == groups.tp.rank():
                experts[number] = _GatedLinear(gate_and_up[rank], down[rank], rows)
    router_EH = mlp.router.weight.detach().float()
    return _Experts(router_EH, experts, mlp.router.topk, mlp.config.moe_router_pre_softmax)


def _gather(weight: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [weight]
    gathered = [torch.empty_like(weight) for _ in range(group.size())]
    dist.all_gather(gathered, weight, group=group)
    return gathered


class _GatedLinear:
    """down(silu(gate(x)) · up(x)), every row scaled on request before it goes down."""

    def __init__(self, gate_and_up: Tensor, down: Tensor, rows: int) -> None:
        self._gate_and_up: Projection = project(gate_and_up, rows=rows)
        self._down: Projection = project(down, rows=rows)

    def __call__(self, hidden_NH: Tensor, scale_N: Tensor | None = None) -> Tensor:
        gate, up = self._gate_and_up(hidden_NH).chunk(2, -1)
        inner = F.silu(gate).mul_(up)
        if scale_N is not None:
            inner = (inner * scale_N[:, None]).to(inner.dtype)
        return self._down(inner)


class _Experts:
    """Every token through those of its K likeliest experts that are here (by number).

    The router works in float32 and weights the experts as megatron-core's does.
    """

    def __init__(
        self, router_EH: Tensor, experts: dict[int, _GatedLinear], k: int, softmax_first: bool
    ) -> None:
        self._router_EH, self._experts, self._k, self._softmax_first = router_EH, experts, k, softmax_first

    def __call__(self, hidden_NH: Tensor) -> Tensor:
        weights_NK, chosen_NK = self._route(hidden_NH)
        out_NH = torch.zeros_like(hidden_NH)
        for expert in chosen_NK.unique().tolist():
            if expert not in self._experts:
                continue
            tokens, slots = (chosen_NK == expert).nonzero(as_tuple=True)
            part = self._experts[expert](hidden_NH[tokens], weights_NK[tokens, slots])
            out_NH.index_add_(0, tokens, part)
        return out_NH

    def _route(self, hidden_NH: Tensor) -> tuple[Tensor, Tensor]:
        logits_NE = F.linear(hidden_NH.float(), self._router_EH)
        if self._softmax_first:
            weights, chosen = logits_NE.softmax(-1).topk(self._k, dim=-1)
            return weights, chosen
        top, chosen = logits_NE.topk(self._k, dim=-1)
        return top.softmax(-1), chosen
