"""Process groups of one model: a parallel layout -> HyperCommGrid -> megatron-core's `ProcessGroupCollection`.

Every model (student, teacher) has a layout and a collection of its own, on the ranks `rank_offset ...
rank_offset + layout.world_size - 1`; `initialize_model_parallel` is never called, so two layouts live side by side.
Ranks are ordered tensor-fastest: tp, cp, dp, pp (megatron-core's default order "tp-cp-ep-dp-pp").
"""

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class ParallelLayout:
    """How many ranks share a model: tensor, pipeline, context and data parallel sizes.

    `sequence_parallel` shards the activations between the tensor-parallel regions along the sequence as well.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        """Number of ranks: tensor * pipeline * context * data."""
        return self.tensor * self.pipeline * self.context * self.data

    def __str__(self) -> str:
        names = {"TP": self.tensor, "PP": self.pipeline, "CP": self.context, "DP": self.data}
        return "·".join(f"{name}{size}" for name, size in names.items()) + (
            "·SP" if self.sequence_parallel else ""
        )


_GROUPS: dict[str, list[str]] = {
    "tp": ["tp"],
    "cp": ["cp"],
    "dp": ["dp"],
    "pp": ["pp"],
    "mp": ["tp", "pp"],
    "dp_cp": ["cp", "dp"],
    "tp_cp": ["tp", "cp"],
    "tp_dp_cp": ["tp", "cp", "dp"],
}


def _subgroup(rank_lists: list[list[int]]) -> dist.ProcessGroup | None:
    """One new group for each list; returns the one this rank is in, None if it is in none. Collective on WORLD."""
    mine = None
    for ranks in rank_lists:
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine = group
    return mine


def build_groups(layout: ParallelLayout, rank_offset: int = 0) -> ProcessGroupCollection:
    """The process groups of a model with this layout. Collective: every rank of WORLD calls it, in the same order.

    Expert groups stand for "no experts": `ep` has this rank alone, expert tensor/data groups equal the dense ones.
    """
    grid = HyperCommGrid(
        [layout.tensor, layout.context, layout.data, layout.pipeline],
        ["tp", "cp", "dp", "pp"],
        rank_offset=rank_offset,
    )
    groups = ProcessGroupCollection(**{name: grid.create_pg(dims) for name, dims in _GROUPS.items()})
    pipelines = grid.get_rank_enum("pp")
    groups.embd = _subgroup([sorted({ranks[0], ranks[-1]}) for ranks in pipelines])
    groups.pos_embd = _subgroup([[ranks[0]] for ranks in pipelines])
    groups.ep = _subgroup([[rank] for rank in range(rank_offset, rank_offset + layout.world_size)])
    groups.expt_tp = groups.tp
    groups.tp_ep = groups.tp
    groups.tp_ep_pp = groups.mp
    groups.expt_dp = groups.intra_expt_dp = groups.dp_cp
    groups.intra_dp_cp = groups.dp_cp
    groups.intra_dist_opt = _subgroup([list(range(rank_offset, rank_offset + layout.world_size))])
    groups.inter_dist_opt = None
    groups.hcp = None
    if (
        parallel_state._GLOBAL_MEMORY_BUFFER is None
    ):  # megatron-core's sequence-parallel layers take scratch from it
        parallel_state._set_global_memory_buffer()
    return groups
