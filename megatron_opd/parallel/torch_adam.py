"""Let megatron-core's DistributedOptimizer resume when its Adam is `torch.optim.AdamW`.

Without transformer-engine and Apex, megatron-core falls back to torch's Adam, which keeps `step` as one tensor a
parameter where FusedAdam keeps a number a group. DistributedOptimizer (0.16.1) then (a) cannot make the state it loads
into before the first step, (b) copies `step` like a sharded moment, and (c) gives all parameters one shared `step`
tensor, which every later update advances once per parameter: a silent error. `install()` mends these three places.
It concerns GPU machines without those packages just as much, so it is not part of `cpu`.
"""

import functools
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_MARK = "_megatron_opd_torch_adam"


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Zero moments and step 0 for parameters that were never updated: what the first `step()` would create."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not optimizer.state[param]:
                optimizer.state[param] = {
                    "step": torch.zeros((), dtype=torch.float32, device=param.device),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }


def install() -> bool:
    """Mend DistributedOptimizer for torch's Adam; False where transformer-engine or Apex make it unnecessary."""
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return False
    cls = DistributedOptimizer
    if hasattr(cls, _MARK):
        return True
    state_dict, load_state_dict = cls.state_dict, cls.load_state_dict
    set_states = cls._set_main_param_and_optimizer_states

    @functools.wraps(state_dict)
    def state_dict_after_first_step(self: Any) -> Any:
        if isinstance(self.optimizer, torch.optim.Adam):
            _make_state(self.optimizer)
        return state_dict(self)

    @functools.wraps(load_state_dict)
    def load_state_dict_with_own_steps(self: Any, state: Any) -> None:
        load_state_dict(self, state)
        for entry in self.optimizer.state.values():
            if torch.is_tensor(entry.get("step")):
                entry["step"] = entry["step"].clone()

    @functools.wraps(set_states)
    @torch.no_grad()
    def set_states_without_step(self: Any, model_param: torch.nn.Parameter, tensors: dict) -> None:
        group, order = self.model_param_group_index_map[model_param]
        entry = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = entry.pop("step", None)
        try:
            set_states(self, model_param, tensors)
        finally:
            if step is not None:
                entry["step"] = step

    cls.state_dict = state_dict_after_first_step
    cls.load_state_dict = load_state_dict_with_own_steps
    cls._set_main_param_and_optimizer_states = set_states_without_step
    setattr(cls, _MARK, True)
    return True
