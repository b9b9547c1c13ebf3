"""Process groups of a run whose teacher has a layout of its own."""

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opd.config.schema import ParallelConfig, TimeoutsConfig
from megatron_opd.parallel.groups import ParallelLayout, build_groups
from megatron_opd.preflight import Checked
from megatron_opd.teacher.orders import Orders
from megatron_opd.teacher.transport import Layouts


@dataclass(frozen=True)
class Relay:
    """Both layouts, and the groups that the teacher adds to the student's."""

    layouts: Layouts
    groups: ProcessGroupCollection  # the teacher's
    payload_group: dist.ProcessGroup  # every rank; for payloads alone
    orders: Orders | None  # on rank 0 and on the ranks of a teacher that has some of its own

    @property
    def separate(self) -> bool:
        """Whether the teacher has ranks of its own."""
        return self.layouts.first > 0

    @classmethod
    def of(cls, checked: Checked, timeouts: TimeoutsConfig) -> "Relay | None":
        """None where the teacher has the student's layout. Collective over WORLD, after the student's groups."""
        own = checked.teacher_parallel
        if own is None:
            return None
        student, teacher = layout_of(checked.parallel), layout_of(own)
        layouts = Layouts(student, teacher, first=student.world_size if own.separate else 0)
        groups = build_groups(teacher, layouts.first, timeouts.collective)
        payload_group = dist.new_group(range(dist.get_world_size()), timeout=timeouts.collective)
        dist.barrier(payload_group)  # NCCL wants all ranks in a group's first call
        orders = None
        if own.separate:
            told = [0, *range(layouts.first, dist.get_world_size())]
            group = dist.new_group(told, timeout=timeouts.idle, backend="gloo")
            orders = Orders(group) if dist.get_rank() in told else None
        return cls(layouts, groups, payload_group, orders)


def layout_of(parallel: ParallelConfig) -> ParallelLayout:
    """The layout that a checked section of the configuration describes."""
    assert parallel.data is not None
    return ParallelLayout(
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
        parallel.data,
        parallel.sequence_parallel,
        parallel.expert,
        parallel.virtual_pipeline,
    )
