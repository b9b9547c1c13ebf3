"""The two kernels that stand in for SGLang's on a CPU."""

import pytest
import torch

from tools.sglang_cpu import sgl_kernel
from tools.sglang_cpu.sgl_kernel import mamba

HASHES = {  # (seed, position) -> hashes of columns 0, 1, 999 and 151935, recorded from SGLang 0.5.23's Triton kernel
    (0, 0): (2167721464, 10027521, 664908232, 1065631903),
    (1, 7): (3755322398, 4196701286, 3493583889, 3069571401),
    (2**40 + 12345, 123456): (514087865, 4059036332, 2741923030, 2597151077),
    (2**63 - 1, 2**31 - 1): (1367382394, 1259439722, 1147811402, 3190621704),
}


def test_the_hash_is_that_of_the_gpu_kernel() -> None:
    seeds, positions = (torch.tensor(column) for column in zip(*HASHES, strict=True))
    columns = torch.tensor([0, 1, 999, 151935])
    hashed = sgl_kernel.murmur_hash32(seeds.to(torch.uint64), positions, columns)
    assert hashed.dtype == torch.uint32
    assert [tuple(row) for row in hashed.tolist()] == list(HASHES.values())


def test_cache_slots_go_to_the_rows_of_their_requests() -> None:
    table = torch.zeros(4, 6, dtype=torch.int32)
    rows, starts, ends = torch.tensor([2, 0, 3]), torch.tensor([1, 0, 4]), torch.tensor([4, 2, 4])
    sgl_kernel.assign_req_to_token_pool_cpu(rows, table, starts, ends, torch.arange(11, 16), 6)
    assert table.tolist() == [[14, 15, 0, 0, 0, 0], [0] * 6, [0, 11, 12, 13, 0, 0], [0] * 6]


@pytest.mark.parametrize("module", [sgl_kernel, mamba])
def test_any_other_kernel_can_be_imported_and_says_that_it_is_not_here(module) -> None:
    with pytest.raises(
        NotImplementedError, match=r"copy_all_layer_kv_cache_cpu is not part of tools/sglang_cpu"
    ):
        module.copy_all_layer_kv_cache_cpu()
    assert not hasattr(module, "convert_weight_packed")
