"""What a process of a run does that is only the teacher's: it scores for the student until the run is over."""

import os

import torch.distributed as dist

from megatron_opd.checkpoint.published import Retention
from megatron_opd.checkpoint.store import CheckpointStore
from megatron_opd.checkpoint.weights import join_load
from megatron_opd.config.layout_checks import teacher_processes
from megatron_opd.config.schema import Config
from megatron_opd.parallel import cpu
from megatron_opd.parallel.groups import build_groups
from megatron_opd.preflight import check_before_start, check_offload
from megatron_opd.teacher.separate import serve
from megatron_opd.training.job import init_distributed
from megatron_opd.training.models import load_separate
from megatron_opd.training.relay import Relay, layout_of
from megatron_opd.training.student import join_build
from megatron_opd.watch.phases import Phases
from megatron_opd.watch.stopping import Stopping
from megatron_opd.watch.watchdog import Watchdog


def only_teaches(config: Config) -> bool:
    """Whether this process, one of those that a launcher started, is the teacher's alone: the last ones are."""
    rank, processes = (
        int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))
    )
    return rank >= processes - teacher_processes(config) > 0


def teach(config: Config, stopping: Stopping) -> bool:
    """Run the teacher's part of the training that `config` describes. Returns whether it has come to its last step.

    Collective: in step with `train` on the student's ranks, from the process groups to the end. Raises UserError as
    `set_up`. A signal to this rank is for the student's: these stop the run.
    """
    check_offload(config)
    checked = check_before_start(config, int(os.environ["WORLD_SIZE"]))
    cpu.install()
    device = init_distributed(config.timeouts.collective)
    groups = build_groups(layout_of(checked.parallel), timeout=config.timeouts.collective)
    relay = Relay.of(checked, config.timeouts)
    assert relay is not None and relay.orders is not None
    model = load_separate(config, checked, relay, device)
    join_build()
    folder = config.run_dir / "checkpoints"
    retention = Retention(config.checkpoint.keep_last)  # rank 0, which is the student's, heeds its own
    store = CheckpointStore(folder, retention, groups, config.student.path, identity={})
    newest = store.newest_intact()
    if newest is not None:
        join_load(newest)
    stopping.begin()
    phases, limits = Phases(), config.timeouts.limits
    limits["teacher"] += limits["step"]  # which takes the payloads one by one
    with Watchdog(phases, limits, config.run_dir):
        finished = serve(
            model,
            relay.layouts,
            relay.payload_group,
            relay.orders,
            store.join_save,
            store.publish,
            device=device,
            phases=phases,
        )
    stopping.leave()
    dist.destroy_process_group()
    return finished
