"""Hidden states of packed sequences shared by context-parallel ranks: those of the whole, rotary positions included."""

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_opd.models.gpt import packed_forward
from megatron_opd.objectives import zigzag_positions
from megatron_opd.parallel.groups import ParallelLayout
from tests.checkpoint.models import write_hf
from tests.models.rope_variants import ROPE_VARIANTS
from tests.rollout.models import load


def _hidden(folder: Path, layout: ParallelLayout, lengths: list[int]) -> Tensor:
    """Final hidden states [L, H] of this rank's share of the tokens; of its part of them under SP."""
    (model,), _, groups = load(folder, layout)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    mine = zigzag_positions(cu_seqlens, groups.cp.rank(), groups.cp.size())
    tokens = torch.arange(sum(lengths)) * 7 % 131
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        return packed_forward(model, tokens[mine], positions[mine], cu_seqlens)[:, 0]


@pytest.mark.parametrize("lengths", [[32], [8, 32, 16]], ids=["one segment", "several"])
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3", ParallelLayout(context=4)),
        ("llama", ParallelLayout(context=2, tensor=2, sequence_parallel=True)),
        ("qwen3_moe", ParallelLayout(context=2, tensor=2, sequence_parallel=True, expert=4)),
    ],
)
def test_hidden_states(gloo, tmp_path, family, layout, lengths):
    folder = write_hf(tmp_path, family, tied=False, rope_parameters=ROPE_VARIANTS["yarn"])
    expected = gloo(1, _hidden, folder, ParallelLayout(), lengths)[0]
    results = gloo(layout.world_size, _hidden, folder, layout, lengths)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)])
    for rank in range(layout.context):
        parts = results[rank * layout.tensor : (rank + 1) * layout.tensor]
        share = torch.cat(parts) if layout.sequence_parallel else parts[0]
        want = expected[zigzag_positions(cu_seqlens, rank, layout.context)]
        torch.testing.assert_close(share, want, atol=2e-5, rtol=2e-5)
