"""The student as it is trained: model, megatron-core DDP, optimizer, learning-rate schedule."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_opd.config.schema import OptimizerConfig
from megatron_opd.models.gpt import DTYPES, GPT
from megatron_opd.parallel import torch_adam


@dataclass
class Student:
    """The trained model. `chunks` are this rank's bare model chunks, `ddps` their wrappers, which own the gradients."""

    chunks: list[GPT]
    ddps: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    config: OptimizerConfig

    @property
    def learning_rate(self) -> float:
        """Learning rate of the latest step (of the schedule's start before the first)."""
        return float(self.optimizer.param_groups[0]["lr"])

    def continue_after(self, step: int) -> None:
        """Go on after `step` steps with this run's settings, whatever the loaded state was saved with."""
        for group in self.optimizer.param_groups:
            group["max_lr"], group["min_lr"] = self.config.lr, self.config.min_lr
            if self.config.name == "adam":
                group["betas"], group["eps"] = (self.config.beta1, self.config.beta2), self.config.eps
        self.schedule.num_steps = step
        self.schedule.step(0)

    def start_step(self) -> None:
        """Set the learning rate of the next step; it advances with the data, whatever becomes of the updates."""
        self.schedule.step(1)

    def zero_grad(self) -> None:
        """Clear the gradient buffers before a new update."""
        for ddp in self.ddps:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def apply_gradients(self) -> tuple[float, bool]:
        """Clip and apply the reduced gradients; returns (global gradient norm before clipping, applied).

        A norm that is not finite skips the update on all ranks alike: they decide from the same reduced number.
        1 all-reduce of one number, 2 for a model with experts.
        """
        found_inf = self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if found_inf or not math.isfinite(norm):
            return norm, False
        limit = self.optimizer.config.clip_grad
        if limit > 0:
            for part in _parts(self.optimizer):
                clip_grad_by_total_norm_fp32(
                    part.get_parameters(),
                    max_norm=limit,
                    total_norm=norm,
                    use_decoupled_grad=part.config.use_precision_aware_optimizer,
                )
        return norm, bool(self.optimizer.step_with_ready_grads())

    def main_weights(self) -> Iterator[Tensor]:
        """Float32 weights that the optimizer updates, of every parameter of `chunks` in order, whole on every rank.

        Collectives: where the optimizer shards them, 1 all-reduce a bf16 parameter over the ranks that share it.
        """
        owners = {
            parameter: part
            for part in _parts(self.optimizer)
            for buffer in (part.buffers if part.config.use_distributed_optimizer else ())
            for parameter in buffer.param_index_map
        }
        for chunk in self.chunks:
            for parameter in chunk.parameters():
                yield _main_weight(parameter, owners.get(parameter))


def build_student(
    chunks: Sequence[GPT],
    config: OptimizerConfig,
    groups: ProcessGroupCollection,
    *,
    precision: str,
    steps: int,
) -> Student:
    """Wrap a model whose weights are loaded for training.

    The optimizer's state is sharded over the data- and context-parallel ranks when `config.sharded`. Gradients are
    reduced in float32 and bf16 weights have float32 masters.
    """
    torch_adam.install()
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=config.sharded,
        grad_reduce_in_fp32=True,
        check_for_nan_in_grad=False,  # all ranks judge the reduced norm instead, and skip together
        average_in_collective=False,  # the loss is a sum over tokens; finalize_model_grads divides by their number
    )
    shared = chunks[0].config
    ddps = [DistributedDataParallel(shared, ddp_config, chunk, pg_collection=groups) for chunk in chunks]
    optimizer = get_megatron_optimizer(
        _optimizer_settings(config, precision),
        ddps,
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    _complete(optimizer)
    shared.finalize_model_grads_func = finalize_model_grads
    shared.grad_scale_func = optimizer.scale_loss
    shared.no_sync_func = [ddp.no_sync for ddp in ddps] if len(ddps) > 1 else ddps[0].no_sync
    trained = [chunk.train() for chunk in chunks]
    return Student(trained, ddps, optimizer, _build_schedule(optimizer, config, steps), config)


def join_build() -> None:
    """What a rank of another model does while the student's ranks call `build_student`.

    megatron-core compares the groups of parameters over WORLD: those of dense weights, then those of experts.
    """
    for _ in range(2):
        dist.all_gather_object([None] * dist.get_world_size(), [])


def _optimizer_settings(config: OptimizerConfig, precision: str) -> MegatronOptimizerConfig:
    """Those of this run in megatron-core's words."""
    return MegatronOptimizerConfig(
        optimizer=config.name,
        sgd_momentum=0.0,
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=precision == "bf16",
        params_dtype=DTYPES[precision],
        use_distributed_optimizer=config.sharded,
        optimizer_cpu_offload=config.cpu_offload,
        optimizer_offload_fraction=1.0,
        overlap_cpu_optimizer_d2h_h2d=config.cpu_offload,
        use_precision_aware_optimizer=config.cpu_offload,  # megatron-core offloads no other
    )


def _main_weight(parameter: torch.nn.Parameter, owner: Any) -> Tensor:
    """Of one parameter; `owner` is the distributed optimizer that shards it, if one does."""
    if parameter.dtype == torch.float32:
        return parameter.detach()
    main = getattr(parameter, "main_param", None)
    if owner is None:
        assert main is not None, "bf16 weights have float32 masters"
        return main.detach()
    whole = torch.zeros_like(parameter, dtype=torch.float32)
    if main is not None:  # this rank has a part
        mine = owner._get_model_param_range_map(parameter)["param"]
        whole.view(-1)[mine.start : mine.end] = main.detach()
    dist.all_reduce(whole, group=owner.data_parallel_group)
    return whole


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """megatron-core has an optimizer of its own for experts, chained to that of the dense weights."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _complete(optimizer: MegatronOptimizer) -> None:
    """What megatron-core leaves out: torch's AdamW has a fused kernel on every device, and SGD no state to resume."""
    for part in _parts(optimizer):
        if part.init_state_fn is None:
            part.init_state_fn = _no_state
        if isinstance(part.optimizer, torch.optim.Adam):
            for group in part.optimizer.param_groups:
                group["fused"], group["foreach"] = True, False


def _no_state(optimizer: torch.optim.Optimizer, config: MegatronOptimizerConfig | None = None) -> None:
    """Make the state that loading fills."""
    del optimizer, config


def _build_schedule(
    optimizer: MegatronOptimizer, config: OptimizerConfig, steps: int
) -> OptimizerParamScheduler:
    """Step k = 1 ... `steps` uses the rate at k: the warm-up starts above zero and `steps` ends at min_lr."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(steps, config.warmup_steps + 1),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
