"""A rank for the watchdog's tests: `python tests/watch/worker.py BEHAVIOUR RUN_DIR`."""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_opd.watch.phases import ROLLOUT, STEP, Phases
from megatron_opd.watch.watchdog import Watchdog


def draw_for_ever() -> None:
    while True:
        time.sleep(0.1)


def main(behaviour: str, run_dir: Path) -> None:
    """The last rank is still in its rollout, or gone from it; the others are in the step."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    limits = {
        STEP: 1000.0 if behaviour == "gone" else 3.0,
        ROLLOUT: 3.0 if dist.get_world_size() == 1 else 1000.0,
    }
    phases = Phases()
    with Watchdog(phases, limits, run_dir):
        if dist.get_rank() < dist.get_world_size() - 1:
            with phases(STEP):
                dist.all_reduce(torch.ones(1))
        with phases(ROLLOUT):
            if behaviour == "gone":
                time.sleep(4)  # long enough to have said where it is
                os._exit(0)
            draw_for_ever()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
