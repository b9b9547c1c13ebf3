"""Runs megatron-core's forward/backward schedule of one model over its microbatches, with explicit process groups."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config


def run_schedule(
    forward_step: Callable[[Any, torch.nn.Module], tuple[torch.Tensor, Callable | None]],
    inputs: Iterable[Any],
    model: torch.nn.Module,
    groups: ProcessGroupCollection,
    *,
    count: int,
    forward_only: bool,
    collect: bool = False,
) -> list[Any]:
    """Run `count` microbatches through this rank's pipeline stage; every rank of the model calls it.

    `forward_step(iterator, model)` takes the next input and returns the stage's output and a loss function. On the
    last stage the loss function's logs (with `collect`, whatever `loss(output, non_loss_data=True)` returns) come back
    in a list of `count`; other stages get an empty list. Unless `forward_only`, the gradients are reduced and
    normalised when it returns (`finalize_model_grads`).

    Collectives: between stages one send/receive a microbatch and direction, and one for its shape.
    """
    pipelined = groups.pp.size() > 1
    run = forward_backward_pipelining_without_interleaving if pipelined else forward_backward_no_pipelining
    communicator = (
        {"p2p_communicator": P2PCommunicator(groups.pp, get_model_config(model))} if pipelined else {}
    )
    with torch.set_grad_enabled(not forward_only):
        return run(
            forward_step_func=forward_step,
            data_iterator=iter(inputs),
            model=model,
            num_microbatches=count,
            seq_length=groups.tp.size(),  # not used: the shapes travel with the tensors (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=collect,
            pg_collection=groups,
            **communicator,
        )
