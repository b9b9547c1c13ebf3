"""Process groups of one model: a parallel layout -> HyperCommGrid -> megatron-core's `ProcessGroupCollection`.

Every model (student, teacher) has a layout and a collection of its own, on the ranks `rank_offset ...
rank_offset + layout.world_size - 1`; `initialize_model_parallel` is never called, so two layouts live side by side.
Ranks are ordered tensor-fastest: tp, cp, dp, pp (megatron-core's default order "tp-cp-ep-dp-pp"). Experts are spread
over the same ranks in a second grid, ep, (rest of tp, cp and dp), pp: neighbours share the experts, each one whole.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opd.config.layout_checks import segment_alignment

TIMEOUT = timedelta(minutes=30)
"""Of a collective, unless a run says otherwise. A new NCCL group would have 10 minutes, whatever the default has."""


@dataclass(frozen=True)
class ParallelLayout:
    """How many ranks share a model: tensor, pipeline, context and data parallel sizes.

    `sequence_parallel` shards the activations between the tensor-parallel regions along the sequence as well.
    `expert` of the tensor * context * data ranks that hold the same layers share the experts of a mixture among them,
    instead of holding all; an expert is never cut. `virtual_pipeline` is how many groups of consecutive layers, model
    chunks, a pipeline rank holds; the chunks of all ranks interleave. Neither adds ranks.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False
    expert: int = 1
    virtual_pipeline: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks: tensor * pipeline * context * data."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def microbatch_multiple(self) -> int:
        """What the number of microbatches of a pass is a multiple of: interleaved, they go round in groups."""
        return self.pipeline if self.virtual_pipeline > 1 else 1

    @property
    def segment_alignment(self) -> int:
        """What the length of every packed segment is a multiple of."""
        return segment_alignment(self.tensor, self.context, self.sequence_parallel)

    def rank(self, *, tensor: int, context: int, data: int, pipeline: int) -> int:
        """The rank at these places, counted from the layout's first."""
        return tensor + self.tensor * (context + self.context * (data + self.data * pipeline))

    def __str__(self) -> str:
        names = {"TP": self.tensor, "PP": self.pipeline, "CP": self.context, "DP": self.data}
        if self.expert > 1:
            names["EP"] = self.expert
        if self.virtual_pipeline > 1:
            names["VPP"] = self.virtual_pipeline
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
_EXPERT_GROUPS: dict[str, list[str]] = {
    "ep": ["ep"],
    "expt_tp": ["tp"],
    "expt_dp": ["dp"],
    "tp_ep": ["tp", "ep"],
    "tp_ep_pp": ["tp", "ep", "pp"],
}


def _subgroup(rank_lists: list[list[int]], timeout: timedelta) -> dist.ProcessGroup | None:
    """One new group for each list; returns the one this rank is in, None if it is in none. Collective on WORLD."""
    mine = None
    for ranks in rank_lists:
        group = dist.new_group(ranks, timeout=timeout)
        if dist.get_rank() in ranks:
            mine = group
    return mine


def all_ranks(groups: ProcessGroupCollection) -> dist.ProcessGroup:
    """The group of every rank of a model, which megatron-core names by what its optimizer uses it for."""
    return groups.intra_dist_opt


def build_groups(
    layout: ParallelLayout, rank_offset: int = 0, timeout: timedelta = TIMEOUT
) -> ProcessGroupCollection:
    """The process groups of a model with this layout. Collective: every rank of WORLD calls it, in the same order."""
    same_layers = layout.tensor * layout.context * layout.data
    assert same_layers % layout.expert == 0, f"{layout}: EP does not divide TP * CP * DP"
    grid = HyperCommGrid(
        [layout.tensor, layout.context, layout.data, layout.pipeline],
        ["tp", "cp", "dp", "pp"],
        rank_offset=rank_offset,
    )
    experts = HyperCommGrid(
        [1, layout.expert, same_layers // layout.expert, layout.pipeline],
        ["tp", "ep", "dp", "pp"],
        rank_offset=rank_offset,
    )
    groups = ProcessGroupCollection(
        **{name: grid.create_pg(dims, timeout=timeout) for name, dims in _GROUPS.items()},
        **{name: experts.create_pg(dims, timeout=timeout) for name, dims in _EXPERT_GROUPS.items()},
    )
    pipelines = grid.get_rank_enum("pp")
    groups.embd = _subgroup([sorted({ranks[0], ranks[-1]}) for ranks in pipelines], timeout)
    groups.pos_embd = _subgroup([[ranks[0]] for ranks in pipelines], timeout)
    groups.intra_expt_dp = groups.expt_dp
    groups.intra_dp_cp = groups.dp_cp
    groups.intra_dist_opt = _subgroup([list(range(rank_offset, rank_offset + layout.world_size))], timeout)
    groups.inter_dist_opt = None
    groups.hcp = None
    if (
        parallel_state._GLOBAL_MEMORY_BUFFER is None
    ):  # megatron-core's sequence-parallel layers take scratch from it
        parallel_state._set_global_memory_buffer()
    return groups
