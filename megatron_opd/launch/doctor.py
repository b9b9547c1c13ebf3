"""What this machine has, what training needs of it, and what is missing: `megatron-opd doctor`."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_opd.launch.local import run_workers
from megatron_opd.parallel.cpu import CHECKED_MEGATRON_CORE

OK, NOTE, MISSING = "ok", "note", "missing"
_COLOURS = {OK: "green", NOTE: "yellow", MISSING: "bold red"}
_GIB = 1024**3
_REQUIRED = ("transformers", "safetensors", "datasets", "tensorboard", "matplotlib")
_OPTIONAL = {  # distribution -> what it is good for
    "transformer-engine": "attention (bf16) and fused Adam on NVIDIA GPUs",
    "apex": "fused optimizer on NVIDIA GPUs",
    "sglang": "servers that draw or score rollouts (python in rollout.sglang, teacher.sglang: another environment)",
}


@dataclass(frozen=True)
class Check:
    """One line of the report. `state` is OK, NOTE (training works without it) or MISSING (it does not)."""

    name: str
    found: str
    state: str = OK
    remedy: str = ""


def checks() -> Iterator[Check]:
    """Every check, in the order of the report. The last ones start processes and take some seconds."""
    yield Check("python", platform.python_version())
    yield from _torch()
    yield _megatron_core()
    for name in _REQUIRED:
        version = _version(name)
        yield Check(name, version) if version else Check(name, "-", MISSING, f"pip install {name}")
    for name, purpose in _OPTIONAL.items():
        version = _version(name)
        yield Check(name, version) if version else Check(name, "-", NOTE, f"optional: {purpose}")
    yield from _machine()
    yield _allreduce("gloo", 2)
    if torch.cuda.is_available() and dist.is_nccl_available():
        yield _allreduce("nccl", min(2, torch.cuda.device_count()))


def report(found: Callable[[], Iterator[Check]] = checks) -> int:
    """Prints the checks as a table to stdout. Returns 0 when this machine can train, else 1."""
    table = Table("check", "found", "", "remark", title="megatron-opd doctor", title_justify="left")
    missing = []
    for check in found():
        mark = f"[{_COLOURS[check.state]}]{check.state}[/]"
        table.add_row(check.name, check.found, mark, check.remedy)
        if check.state == MISSING:
            missing.append(check.name)
    console = Console()
    console.print(table)
    console.print(f"cannot train here: {', '.join(missing)}" if missing else "this machine can train")
    return 1 if missing else 0


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
            f"gpu {index}", f"{device.name}, {device.total_memory / _GIB:.0f} GiB, CUDA {torch.version.cuda}"
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
    yield Check("memory", f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free")
    full = disk.free < 2 * _GIB
    yield Check(
        "disk, here",
        f"{disk.free / _GIB:.1f} GiB free",
        NOTE if full else OK,
        "checkpoints need more" if full else "",
    )


def _allreduce(backend: str, processes: int) -> Check:
    """A sum over `processes` ranks that really run here, started as `launch local` starts a training."""
    outcome = run_workers(["-m", "megatron_opd.launch.allreduce", backend], processes)
    name = f"{backend} all-reduce"
    if outcome.exit_code == 0:
        return Check(name, f"right on {processes} processes")
    remedy = "processes on this machine cannot reach each other through localhost"
    return Check(name, outcome.message or f"exit code {outcome.exit_code}", MISSING, remedy)
