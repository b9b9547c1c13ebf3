"""What a run finds around it, of the configuration that it has: its directory's disk, its servers, and its layout."""

import fcntl
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_opd.config.rollout import SGLangConfig
from megatron_opd.config.schema import Config
from megatron_opd.errors import UserError, why_refused
from megatron_opd.launch.check import GIB, MISSING, NOTE, OK, Check
from megatron_opd.models.architecture import ServedModel, read_served
from megatron_opd.preflight import Checked, check_before_start, check_devices, check_offload
from megatron_opd.rollout.client import SGLangClient
from megatron_opd.rollout.replicas import BadReply
from megatron_opd.rollout.server_start import hold_port
from megatron_opd.teacher.contract import check_contract

PROBE_BYTES, PIECE_BYTES = 256 << 20, 16 << 20
PROBE_SECONDS = 3.0  # then what has been written is enough
SLOW_DISK = 0.1  # GB/s
STATE_BYTES = {"adam": 12, "sgd": 4}  # of a weight, besides the weight itself, in a checkpoint
SEEN_WITHIN = 10.0  # seconds that a shared file system may take to show a new file elsewhere
ASK_TIMEOUT = 20.0


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def layout_checks(config: Config, processes: int, here: int) -> Iterator[Check]:
    """Whether the run would start on `processes`, `here` of them on this machine, and what its checkpoints need."""
    try:
        check_offload(config)
        checked = check_before_start(config, processes)
        check_devices(here)
    except UserError as error:
        yield Check("configuration", f"{processes} processes", MISSING, str(error))
        return
    yield Check("configuration", f"fits {processes} process{'' if processes == 1 else 'es'}")
    yield _space(config, checked)
    for section, served in (
        ("rollout.sglang", config.rollout.sglang),
        ("teacher.sglang", config.teacher.sglang),
    ):
        if served.python is not None:
            yield _sglang_version(section, served.python)
            yield _server_ports(section, served)


def _space(config: Config, checked: Checked) -> Check:
    """Checkpoints that are kept, the next one, which is written before the oldest is removed, and the export."""
    weight = {"bf16": 2, "fp32": 4}[config.precision]
    state = weight + STATE_BYTES[config.optimizer.name] + (4 if config.teacher.ema is not None else 0)
    copies = state * (config.checkpoint.keep_last + 1) + (weight if config.checkpoint.export_hf else 0)
    needed = checked.student.parameter_count() * copies / GIB
    free = shutil.disk_usage(existing(config.run_dir)).free / GIB
    full = needed > free
    remedy = "lower checkpoint.keep_last, or give a run_dir on another disk" if full else ""
    found = f"{free:.1f} GiB free, checkpoints take {needed:.1f}"
    return Check("run_dir, space", found, MISSING if full else OK, remedy)


def _sglang_version(section: str, python: Path) -> Check:
    code = "import importlib.metadata as m; print(m.version('sglang'))"
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(f"{section}.python", str(python), MISSING, f"it does not run: {error}")
    if done.returncode:
        return Check(
            f"{section}.python",
            str(python),
            MISSING,
            "its environment has no SGLang: pip install sglang there",
        )
    return Check(f"{section}.python", f"SGLang {done.stdout.strip()}")


def _server_ports(section: str, served: SGLangConfig) -> Check:
    """Whether as many ports as there are servers can be had at their address, as at their start."""
    held: list[socket.socket] = []
    try:
        ports = []
        for _ in range(served.servers):
            one, port = hold_port(served.host)
            held.append(one)
            ports.append(str(port))
        return Check(f"{section}, ports", f"{served.host} has free ones, such as {', '.join(ports)}")
    except OSError as error:
        remedy = f"{error.strerror}: name an address of this machine in {section}.host"
        return Check(f"{section}, ports", f"cannot listen at {served.host}", MISSING, remedy)
    finally:
        for one in held:
            one.close()


def disk_speed(run_dir: Path, size: int = PROBE_BYTES) -> dict[str, Any]:
    """GB/s of writing and reading at most `size` bytes where the run directory is or will be, "write" and "read".

    Or why not, "refused".
    What is read is not in the host's cache where the system heeds that wish. Locks are tried too.
    """
    folder = existing(run_dir)
    path = folder / f".doctor-{socket.gethostname()}-{os.getpid()}"
    piece, written = os.urandom(PIECE_BYTES), 0
    size = min(size, shutil.disk_usage(folder).free // 10)
    try:
        with path.open("w+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            began = time.perf_counter()
            while written < size and time.perf_counter() - began < PROBE_SECONDS:
                written += file.write(piece)
                os.fsync(file.fileno())
            ended = time.perf_counter()
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            started = time.perf_counter()
            while file.read(PIECE_BYTES):
                pass
            read = time.perf_counter()
    except OSError as error:
        return {"refused": why_refused(error) or str(error.strerror)}
    finally:
        path.unlink(missing_ok=True)
    return {"write": written / (ended - began) / 1e9, "read": written / (read - started) / 1e9}


def disk_check(speeds: dict[str, dict[str, Any]]) -> Check:
    """The line about the disk; `speeds` is what `disk_speed` found on every node, measured at the same time."""
    for node, speed in speeds.items():
        if "refused" in speed:
            remedy = f"{node}: {speed['refused']}: give a run_dir that it can write to, on a disk with locks"
            return Check("run_dir, disk", "not writable", MISSING, remedy)
    node, slowest = min(speeds.items(), key=lambda item: item[1]["write"])
    found = f"writes {slowest['write']:.2f} GB/s, reads {slowest['read']:.2f} GB/s"
    if len(speeds) > 1:
        found += f" on {node}, the slowest of {len(speeds)} nodes at once"
    slow = slowest["write"] < SLOW_DISK
    return Check("run_dir, disk", found, NOTE if slow else OK, "saves will take long" if slow else "")


def sees(path: Path) -> bool:
    """Whether a file that another node has just written is here."""
    deadline = time.monotonic() + SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        os.listdir(path.parent)  # has a network file system look again
        time.sleep(0.2)
    return True


def urls_of(config: Config) -> dict[str, Sequence[str]]:
    """The servers that run already, by section."""
    sections = {"rollout.sglang": config.rollout.sglang.urls, "teacher.sglang": config.teacher.sglang.urls}
    return {section: urls for section, urls in sections.items() if urls}


def reach(config: Config) -> list[Check]:
    """A line about every server that runs already, as this machine sees it."""
    lines = []
    for section, urls in urls_of(config).items():
        teacher = section.startswith("teacher")
        try:
            model = read_served(config.teacher.folder if teacher else config.student.path)
        except UserError:  # which has a line of its own
            continue
        longest = (config.teacher_prompt_tokens if teacher else config.data.max_prompt_tokens) + (
            config.rollout.max_new_tokens
        )
        lines += [_server(section, url, model, longest if teacher else None) for url in urls]
    return lines


def _server(section: str, url: str, model: ServedModel, scored: int | None) -> Check:
    """Of one server; a teacher's has to score sequences of `scored` tokens."""
    client = SGLangClient()
    client.connect([url], api_key=os.environ.get("SGLANG_API_KEY"), outage_timeout=ASK_TIMEOUT, key=section)
    name = f"{section} {url}"
    try:
        info, settings = client.ask_all("/model_info")[url], client.ask_all("/server_info")[url]
        trouble = next((found for found in (info, settings) if isinstance(found, BadReply | UserError)), None)
        if trouble is not None or not isinstance(info, dict) or not isinstance(settings, dict):
            remedy = "start it, check the address, or set SGLANG_API_KEY to its key"
            return Check(name, str(trouble or "it is no SGLang server"), MISSING, remedy)
        found = f"SGLang {settings.get('version', '?')}, {info.get('model_path')}, weights {info.get('weight_version')}"
        if scored is not None:
            check_contract(client.ask_all, model, scored)
        served = info.get("architectures")
        if scored is None and served and model.architectures and set(served) != set(model.architectures):
            remedy = f"it serves {', '.join(served)}, the student is {', '.join(model.architectures)}"
            return Check(name, found, MISSING, remedy)
        return Check(name, found)
    except UserError as error:
        return Check(name, "refused", MISSING, str(error))
    finally:
        client.close()


def device_checks(local_ranks: int) -> Iterator[Check]:
    """Whether this machine has what `local_ranks` processes of a run need."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and local_ranks > gpus:
        yield Check("gpus", f"{gpus} for {local_ranks} processes", MISSING, "start one process a GPU")
    threads = int(os.environ.get("OMP_NUM_THREADS") or 0) * local_ranks
    if not gpus and threads > cores:
        yield Check(
            "threads",
            f"{threads} on {cores} cores",
            NOTE,
            f"OMP_NUM_THREADS={max(1, cores // local_ranks)} is faster",
        )
