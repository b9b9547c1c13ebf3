"""What the machines of a run have, what training needs of them, and what is missing: `megatron-opd doctor`."""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_opd.config.layout_checks import processes_of_run
from megatron_opd.config.schema import Config
from megatron_opd.errors import UserError
from megatron_opd.launch.check import GIB, MISSING, NOTE, OK, Check
from megatron_opd.launch.connections import checks_of, read_measured, this_node
from megatron_opd.launch.local import run_workers
from megatron_opd.launch.started import Meeting, meeting, place_of
from megatron_opd.launch.surroundings import (
    device_checks,
    disk_check,
    disk_speed,
    existing,
    layout_checks,
    reach,
    sees,
)
from megatron_opd.parallel.cpu import CHECKED_MEGATRON_CORE

_COLOURS = {OK: "green", NOTE: "yellow", MISSING: "bold red"}
_REQUIRED = ("transformers", "safetensors", "datasets", "tensorboard", "matplotlib")
_OPTIONAL = {  # distribution -> what it is good for
    "transformer-engine": "attention (bf16) and fused Adam on NVIDIA GPUs",
    "apex": "fused optimizer on NVIDIA GPUs",
    "sglang": "servers that draw or score rollouts (python in rollout.sglang, teacher.sglang: another environment)",
}


def examine(config: Config | None = None) -> int:
    """Prints the report on this machine, or on all whose ranks `srun` or another launcher has started; see `report`.

    With a configuration also on what that run needs. Started ranks all call it and return the same; rank 0 prints.
    """
    place = place_of(os.environ)
    if place is None:
        return report(lambda: checks(config))
    try:
        with meeting(place) as ranks:
            lines = list(_checks_of_ranks(ranks, config))
            code: int = ranks.tell(report(lambda: iter(lines)) if ranks.leads else None)
            ranks.leave()
            return code
    except UserError as error:
        if place.rank:
            print(f"error: {error}", file=sys.stderr)
            return 1
        lines = [*_software(), Check("ranks", str(place.size), MISSING, str(error))]
        return report(lambda: iter(lines))


def checks(config: Config | None = None) -> Iterator[Check]:
    """Every check of this machine alone, in the order of the report. The last ones start processes and take seconds."""
    yield from _software()
    yield from _machine()
    if config is not None:
        processes = processes_of_run(config)
        yield from device_checks(processes)
        yield from layout_checks(config, processes, processes)
        yield disk_check({this_node(): disk_speed(config.run_dir)})
        yield from reach(config)
    yield from _connections("gloo", 2)
    if torch.cuda.is_available() and dist.is_nccl_available():
        yield from _connections("nccl", torch.cuda.device_count())


def _checks_of_ranks(ranks: Meeting, config: Config | None) -> Iterator[Check]:
    """The same of all machines of a job; every rank goes through it, rank 0's lines are the report."""
    place, node = ranks.place, this_node()
    nodes = ranks.tell(ranks.gather(node))
    first = nodes.index(node) == place.rank  # speaks for its node
    yield from _software()
    yield from _machine()
    found = {"versions": _versions(), "gpus": [vars(c) for c in device_checks(nodes.count(node)) if first]}
    yield from _alone(nodes, ranks.gather(found))
    if config is not None:
        if ranks.leads:
            yield from layout_checks(config, place.size, nodes.count(node))
        yield from _shared_folder(ranks, nodes, existing(config.run_dir))
        speeds = ranks.gather(disk_speed(config.run_dir) if first else None)
        if ranks.leads:
            yield disk_check({nodes[rank]: speed for rank, speed in enumerate(speeds) if speed})
        seen = ranks.gather([vars(check) for check in reach(config)] if first else [])
        yield from _of_nodes(nodes, seen)
    yield from ranks.connections("gloo")
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if ranks.tell(all(ranks.gather(cuda))):
        yield from ranks.connections("nccl")


def _alone(nodes: Sequence[str], found: Sequence[dict[str, Any]]) -> Iterator[Check]:
    """What every rank has found by itself, compared."""
    if not found:
        return
    yield Check("ranks", f"{len(nodes)} on {len(set(nodes))} node{'s' if len(set(nodes)) > 1 else ''}")
    first = found[0]["versions"]
    for name in first:
        other = next((rank for rank, each in enumerate(found) if each["versions"][name] != first[name]), None)
        if other is not None:
            theirs = found[other]["versions"][name]
            said = f"{first[name]} on {nodes[0]}, {theirs} on {nodes[other]}"
            yield Check(name, said, MISSING, "install the same everywhere")
    yield from _of_nodes(nodes, [each["gpus"] for each in found])


def _of_nodes(nodes: Sequence[str], found: Sequence[Sequence[dict[str, str]]]) -> Iterator[Check]:
    """The lines of all nodes: those that are in order once, the others with the name of their node."""
    said = set()
    for rank, lines in enumerate(found):
        for line in lines:
            check = Check(**line)
            if check.state == OK and check.name in said:
                continue
            said.add(check.name)
            where = "" if check.state == OK or len(set(nodes)) == 1 else f"{nodes[rank]}: "
            yield Check(check.name, check.found, check.state, f"{where}{check.remedy}")


def _shared_folder(ranks: Meeting, nodes: Sequence[str], folder: Path) -> Iterator[Check]:
    """Whether all ranks see what rank 0 writes where the run directory is."""
    written = folder / f".doctor-token-{os.getpid()}"
    if ranks.leads:
        with suppress(OSError):  # the disk has a line of its own
            written.touch()
    token = Path(ranks.tell(str(written) if written.exists() else ""))
    seen = ranks.gather(not token.name or sees(token))
    if ranks.leads:
        written.unlink(missing_ok=True)
    blind = [rank for rank, there in enumerate(seen) if not there]
    if blind:
        remedy = "give a run_dir on a file system that all nodes share"
        yield Check("run_dir, shared", f"not seen on {nodes[blind[0]]} (rank {blind[0]})", MISSING, remedy)
    elif len(set(nodes)) > 1 and token.name:
        yield Check("run_dir, shared", f"seen on {len(set(nodes))} nodes")


def report(found: Callable[[], Iterator[Check]] = checks) -> int:
    """Prints the checks as a table to stdout. Returns 0 when training can work, else 1."""
    table = Table("check", "found", "", "remark", title="megatron-opd doctor", title_justify="left")
    missing = []
    for check in found():
        mark = f"[{_COLOURS[check.state]}]{check.state}[/]"
        table.add_row(escape(check.name), escape(check.found), mark, escape(check.remedy))
        if check.state == MISSING and check.name not in missing:
            missing.append(check.name)
    console = Console()
    console.print(table)
    verdict = f"cannot train here: {', '.join(missing)}" if missing else "this machine can train"
    console.print(verdict, markup=False)
    return 1 if missing else 0


def _software() -> Iterator[Check]:
    yield Check("python", platform.python_version())
    yield from _torch()
    yield _megatron_core()
    for name in _REQUIRED:
        version = _version(name)
        yield Check(name, version) if version else Check(name, "-", MISSING, f"pip install {name}")
    for name, purpose in _OPTIONAL.items():
        version = _version(name)
        yield Check(name, version) if version else Check(name, "-", NOTE, f"optional: {purpose}")


def _versions() -> dict[str, str | None]:
    """What has to be the same on all ranks of a run."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    names = ("megatron-opd", "megatron-core", *_REQUIRED, "transformer-engine", "apex")
    return found | {name: _version(name) for name in names}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> Iterator[Check]:
    version = torch.__version__.split("+")[0].split(".")
    fits = version[:2] == ["2", "13"]
    yield Check("torch", torch.__version__, OK if fits else NOTE, "" if fits else "checked with 2.13")
    if not torch.cuda.is_available():
        yield Check("cuda", "none", NOTE, "training runs on the CPU")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Check(
            f"gpu {index}", f"{device.name}, {device.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
        )
    if not (dist.is_available() and dist.is_gloo_available()):
        yield Check("gloo", "-", MISSING, "install a torch that was built with gloo")
    else:
        yield Check("gloo", "available")
    if dist.is_available() and dist.is_nccl_available():
        yield Check("nccl", ".".join(str(part) for part in torch.cuda.nccl.version()))
    elif torch.cuda.is_available():
        yield Check("nccl", "-", MISSING, "install a torch that was built with NCCL")
    else:
        yield Check("nccl", "-", NOTE, "only GPUs need it")


def _megatron_core() -> Check:
    version = _version("megatron-core")
    checked = ", ".join(CHECKED_MEGATRON_CORE)
    if version in CHECKED_MEGATRON_CORE:
        return Check("megatron-core", version)
    return Check(
        "megatron-core", version or "-", MISSING, f"pip install megatron-core=={checked} (the one checked)"
    )


def _machine() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    yield Check("cpu cores", str(cores))
    yield Check("memory", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free")
    full = disk.free < 2 * GIB
    yield Check(
        "disk, here",
        f"{disk.free / GIB:.1f} GiB free",
        NOTE if full else OK,
        "checkpoints need more" if full else "",
    )


def _connections(backend: str, processes: int) -> Iterator[Check]:
    """Between `processes` ranks that really run here, started as `launch local` starts a training."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.json"
        outcome = run_workers(["-m", "megatron_opd.launch.connections", backend, str(file)], processes)
        if outcome.exit_code == 0:
            yield from checks_of(read_measured(file), backend)
            return
    remedy = "processes on this machine cannot reach each other through localhost"
    found = outcome.message or f"exit code {outcome.exit_code}"
    yield Check(f"{backend} all-reduce", found, MISSING, remedy)
