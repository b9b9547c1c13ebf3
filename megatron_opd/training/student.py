"""The student as it is trained: model, megatron-core DDP, optimizer, learning-rate schedule."""

import math
from dataclasses import dataclass

import torch
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

from megatron_opd.config.schema import OptimizerConfig
from megatron_opd.models.gpt import DTYPES, GPT
from megatron_opd.parallel import torch_adam


@dataclass
class Student:
    """The trained model. `gpt` is the bare model, `ddp` the wrapper that owns the gradient buffers."""

    gpt: GPT
    ddp: DistributedDataParallel
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
            group["betas"], group["eps"] = (self.config.beta1, self.config.beta2), self.config.eps
        self.schedule.num_steps = step
        self.schedule.step(0)

    def start_step(self) -> None:
        """Set the learning rate of the next step; it advances with the data, whatever becomes of the updates."""
        self.schedule.step(1)

    def zero_grad(self) -> None:
        """Clear the gradient buffers before a new update."""
        self.ddp.zero_grad_buffer()
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


def build_student(
    gpt: GPT, config: OptimizerConfig, groups: ProcessGroupCollection, *, precision: str, steps: int
) -> Student:
    """Wrap a model whose weights are loaded for training.

    The optimizer's state is sharded over the data-parallel ranks when `config.distributed` says so (null: when there
    are several, or the state lies in host memory). Gradients are reduced in float32, bf16 weights have float32 masters.
    """
    torch_adam.install()
    distributed = config.distributed
    if distributed is None:
        distributed = config.cpu_offload or groups.dp.size() > 1
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=distributed,
        grad_reduce_in_fp32=True,
        check_for_nan_in_grad=False,  # all ranks judge the reduced norm instead, and skip together
        average_in_collective=False,  # the loss is a sum over tokens; finalize_model_grads divides by their number
    )
    ddp = DistributedDataParallel(gpt.config, ddp_config, gpt, pg_collection=groups)
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=precision == "bf16",
            params_dtype=DTYPES[precision],
            use_distributed_optimizer=distributed,
            optimizer_cpu_offload=config.cpu_offload,
            optimizer_offload_fraction=1.0,
            overlap_cpu_optimizer_d2h_h2d=config.cpu_offload,
            use_precision_aware_optimizer=config.cpu_offload,  # megatron-core offloads no other
        ),
        [ddp],
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    _use_fused_adam(optimizer)
    gpt.config.finalize_model_grads_func = finalize_model_grads
    gpt.config.grad_scale_func = optimizer.scale_loss
    gpt.config.no_sync_func = ddp.no_sync
    return Student(gpt.train(), ddp, optimizer, _build_schedule(optimizer, config, steps), config)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """megatron-core has an optimizer of its own for experts, chained to that of the dense weights."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _use_fused_adam(optimizer: MegatronOptimizer) -> None:
    """torch's AdamW has a fused kernel on every device; megatron-core does not ask for it."""
    for inner in _parts(optimizer):
        if isinstance(inner.optimizer, torch.optim.Adam):
            for group in inner.optimizer.param_groups:
                group["fused"], group["foreach"] = True, False


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
