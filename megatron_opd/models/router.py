"""The router of a layer with experts: its float32 logits, its balancing loss, and where it sent the tokens.

Shapes: T tokens of a microbatch on this rank, E experts of the layer, K experts a token.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Router(TopKRouter):
    """megatron-core's router, which differs in three places.

    Logits are float32 whatever the dtype of the model; megatron-core's own float32 path needs transformer-engine,
    which it does not check.

    The balancing loss of a microbatch is E * sum over experts of f * P (f: the expert's share of all choices, without
    gradient; P: mean of its probability over the tokens), 1 where the choices are even. It counts the tokens of
    prompts and responses, also those that no objective reads, but no padding; the ranks that share a microbatch (TP
    and CP) count together. Into the loss of an update goes the coefficient times the sum over layers of the mean over
    microbatches, a microbatch counting by its tokens. Being a product of means, it depends on which tokens share a
    microbatch: it is the same in every layout for the same microbatches, not for another packing. megatron-core's own
    is TP * CP times smaller without a mask of padding, and NaN for a microbatch of padding with one.

    In training it records how the tokens were routed, until `take_usage` is called.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._usage: Tensor | None = None

    def gating(self, input: Tensor) -> Tensor:
        """[T, B, H] -> logits [T, B, E], float32."""
        return F.linear(input.float(), self.weight.float())

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights [T, E] and choices [T, E] of logits [T, 1, E]; `padding_mask` [T, 1] is true where nothing counts."""
        weights_TE, chosen_TE = super().routing(logits, padding_mask)
        if self.training and torch.is_grad_enabled():
            self._record(logits.detach().flatten(0, 1), chosen_TE, padding_mask)
        return weights_TE, chosen_TE

    @torch.no_grad()
    def _record(self, logits_TE: Tensor, chosen_TE: Tensor, padding_mask: Tensor | None) -> None:
        logprobs_TE = logits_TE.log_softmax(-1)
        probs_TE = logprobs_TE.exp()
        if padding_mask is not None:
            counted_T1 = ~padding_mask.reshape(-1, 1)
            chosen_TE, probs_TE = chosen_TE & counted_T1, probs_TE * counted_T1
        entropy = -(probs_TE * logprobs_TE).sum()
        usage = torch.cat([chosen_TE.sum(0), probs_TE.sum(0).double(), entropy.double()[None]])
        self._usage = usage if self._usage is None else self._usage + usage

    def take_usage(self) -> Tensor:
        """What this rank recorded since the last call, float64 [2E + 1].

        E counts of choices, E sums of probabilities, the sum of the entropies of the router in nats.
        """
        nothing = torch.zeros(2 * self.weight.size(0) + 1, dtype=torch.float64, device=self.weight.device)
        usage, self._usage = self._usage, None
        return nothing if usage is None else usage

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """Attach coefficient * tokens * balancing loss of the microbatch to the weights [T, E].

        The update's gradient is divided by all its tokens. 1 all-reduce of E counts over the TP and CP ranks.
        """
        del with_padding_mask  # both arguments are zero at padding
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0:
            return probs
        counts_E = routing_map.sum(0)
        dist.all_reduce(counts_E, group=self.tp_cp_group)
        share_E = counts_E / counts_E.sum().clamp(min=1)
        loss = coefficient * counts_E.numel() * (share_E * scores_for_aux_loss.sum(0)).sum()
        return MoEAuxLossAutoScaler.apply(probs, loss)
