"""What is counted of each of several teachers: its tokens, and their reverse KL to it.

    teacher/<name>/tokens       loss tokens that it scored in the step
    teacher/<name>/reverse_kl   mean over them, in nats; `reverse_kl_sampled` where only that is known

Of mixed teachers every one has all tokens, and `reverse_kl` without a name is the weighted mean of theirs.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_opd.teacher.payload import Part, TeacherPayload, weight_of

DISTANCES = ("reverse_kl", "reverse_kl_sampled")


def sum_names(teachers: Sequence[str], objective: Sequence[str]) -> list[str]:
    """The sums of each teacher, given those of the objective."""
    counted = ("tokens", *(name for name in DISTANCES if name in objective))
    return [f"teacher/{teacher}/{name}" for teacher in teachers for name in counted]


def add_values(values: dict[str, Tensor], found: Mapping[str, Tensor], payload: TeacherPayload) -> None:
    """Add to the values [N] of a microbatch's tokens what was `found` with one teacher's payload, weighted."""
    for name, value_N in found.items():
        values[name] = values.get(name, 0.0) + weight_of(payload) * value_N


def own_sums(found: Mapping[str, Tensor], payload: TeacherPayload, mask_T: Tensor) -> dict[str, Tensor]:
    """One of several teachers' own sums of a microbatch with loss positions mask_T; of a teacher alone none."""
    if not isinstance(payload, Part):
        return {}
    own = {name: found[name].sum() for name in DISTANCES if name in found}
    own["tokens"] = mask_T.sum(dtype=torch.float64)
    return {f"teacher/{payload.teacher}/{name}": value for name, value in own.items()}


def per_teacher(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of a step from the sums of its updates; without the distance of a teacher that scored no token."""
    names = [name for name in (updates[0] if updates else {}) if is_of_one(name)]
    total = {name: sum(update[name] for update in updates) for name in names}
    metrics = {}
    for name, value in total.items():
        tokens = total[f"{name.rpartition('/')[0]}/tokens"]
        if name.endswith("/tokens"):
            metrics[name] = value
        elif tokens:
            metrics[name] = value / tokens
    return metrics


def is_of_one(name: str) -> bool:
    """Whether a sum is of one of several teachers."""
    return name.startswith("teacher/")
