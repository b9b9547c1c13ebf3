"""A worker that sums one number over all ranks: `python -m megatron_opd.launch.allreduce gloo|nccl`.

`doctor` starts it to see that processes on this machine find each other. Ends with exit code 0 when the sum
is right.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_opd.launch.worker import end_with_launcher


def main(backend: str) -> int:
    """Joins the ranks that the environment names, sums rank + 1 over them; 0 if the sum is right, else 1."""
    end_with_launcher()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    total = torch.tensor([float(dist.get_rank() + 1)], device=device)
    dist.all_reduce(total)
    size = dist.get_world_size()
    dist.destroy_process_group()
    return 0 if total.item() == size * (size + 1) / 2 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
