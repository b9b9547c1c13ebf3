"""Runs megatron-core's forward/backward schedule of one model over its microbatches, with explicit process groups."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config


def run_schedule(
    forward_step: Callable[[Any, torch.nn.Module], tuple[torch.Tensor, Callable | None]],
    inputs: Sequence[Any],
    chunks: Sequence[torch.nn.Module],
    groups: ProcessGroupCollection,
    *,
    forward_only: bool,
    collect: bool = False,
) -> list[Any]:
    """Run the microbatches `inputs` through this rank's model chunks; every rank of the model calls it.

    `forward_step(iterator, chunk)` takes the next input and returns the chunk's output and a loss function. On the
    last stage the loss function's logs (with `collect`, whatever `loss(output, non_loss_data=True)` returns) of the
    last chunk come back, one an input, in their order; other stages get an empty list. Unless `forward_only`, the
    gradients are reduced and normalised when it returns (`finalize_model_grads`). With several chunks a rank the
    number of inputs is a multiple of the pipeline's ranks (`ParallelLayout.microbatch_multiple`).

    Collectives: between chunks one send/receive a microbatch and direction, and one for its shape.
    """
    run, communicator = forward_backward_no_pipelining, {}
    if groups.pp.size() > 1:
        run = forward_backward_pipelining_without_interleaving
        communicator = {"p2p_communicator": P2PCommunicator(groups.pp, get_model_config(chunks[0]))}
    if len(chunks) > 1:
        assert len(inputs) % groups.pp.size() == 0, "an interleaved pipeline takes microbatches in groups"
        run = forward_backward_pipelining_with_interleaving
    with torch.set_grad_enabled(not forward_only):
        return run(
            forward_step_func=forward_step,
            data_iterator=[iter(inputs) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(inputs),
            seq_length=groups.tp.size(),  # not used: the shapes travel with the tensors (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=collect,
            pg_collection=groups,
            **communicator,
        )
