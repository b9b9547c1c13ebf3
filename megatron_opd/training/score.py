"""What a model as it is now says of the rollouts, in one forward pass without gradients.

The reference policy of a shaped reward is scored so, and the student before several updates on one batch of
rollouts. Shapes: N loss positions of a microbatch, K ids.
"""

from collections.abc import Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_opd.data.packing import Microbatch
from megatron_opd.models.gpt import GPT
from megatron_opd.objectives import LinearLogits, likeliest, sampled_logprob
from megatron_opd.teacher.megatron import from_hidden_states


def sampled_logprobs(
    chunks: Sequence[torch.nn.Module],
    gpt: GPT,
    microbatches: Sequence[Microbatch],
    groups: ProcessGroupCollection,
    *,
    temperature: float,
    vocab_size: int,
    chunk_size: int | None,
    kept_ids_only: bool = False,
) -> list[Tensor | None]:
    """[N] for each microbatch on the last pipeline stage, nats, detached; None on the others.

    With `kept_ids_only` of the model restricted to the ids that sampling kept.
    `chunks` are this rank's, bare or in DDP wrappers; `gpt` is the last of them, bare.
    Collectives: those of a forward pass, 1 all-gather a microbatch.
    """

    def score(hidden_NH: Tensor, microbatch: Microbatch) -> Tensor:
        return sampled_logprob(
            LinearLogits(hidden_NH, gpt.head_weight),
            microbatch.targets_T[microbatch.mask_T],
            temperature=temperature,
            vocab_size=vocab_size,
            group=groups.tp,
            chunk_size=chunk_size,
            kept=microbatch.kept_N() if kept_ids_only else None,
        )

    return from_hidden_states(chunks, microbatches, groups, score)


def likeliest_ids(
    chunks: Sequence[torch.nn.Module],
    gpt: GPT,
    microbatches: Sequence[Microbatch],
    groups: ProcessGroupCollection,
    *,
    k: int,
    vocab_size: int,
    chunk_size: int | None,
) -> list[Tensor | None]:
    """The `k` likeliest ids [N, K] int64 at each loss position; otherwise as `sampled_logprobs`."""

    def find(hidden_NH: Tensor, _: Microbatch) -> Tensor:
        return likeliest(
            LinearLogits(hidden_NH, gpt.head_weight),
            k,
            vocab_size=vocab_size,
            group=groups.tp,
            chunk_size=chunk_size,
        )

    return from_hidden_states(chunks, microbatches, groups, find)
