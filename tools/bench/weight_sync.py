"""Seconds and bytes/s from the trainer's weights to servers that draw with them, for every transport, in one run.

    python -m tools.bench.weight_sync --model FOLDER --python INTERPRETER [--servers N] [--precision fp32] [--repeats 5]
    python -m tools.bench.weight_sync --smoke --model FOLDER --urls http://127.0.0.1:30000

One process trains nothing: it holds the model and pushes it, as a run does after a step. It starts servers with the
interpreter of an environment that has SGLang, or takes those at `--urls`, which serve the model already. The transports
alternate. The first push of each does not count: there the checksums of both sides are compared.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_opd.checkpoint.hf_export import export_hf_tensors
from megatron_opd.checkpoint.weights import load_model_weights
from megatron_opd.models.architecture import read_architecture
from megatron_opd.models.gpt import DTYPES, build_gpt
from megatron_opd.parallel import cpu
from megatron_opd.parallel.groups import ParallelLayout, build_groups
from megatron_opd.rollout.server_start import ServerSettings
from megatron_opd.rollout.servers import Servers
from megatron_opd.rollout.sglang import SGLangEngine
from megatron_opd.weight_sync.disk import DiskTransport
from megatron_opd.weight_sync.distributed import DistributedTransport
from megatron_opd.weight_sync.sync import WeightSync
from megatron_opd.weight_sync.tensor import TensorTransport
from megatron_opd.weight_sync.transport import Transport


def measure(
    model: Path, urls: Sequence[str], precision: str, repeats: int, folder: Path
) -> tuple[dict[str, list[float]], int]:
    """(seconds of every push after the first, by transport; bytes of the tensors)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arch, layout = read_architecture(model), ParallelLayout()
    groups = build_groups(layout)
    padded = arch.padded_vocab_size(1)
    chunks = build_gpt(arch, layout, groups, precision=precision, padded_vocab_size=padded)
    load_model_weights(chunks, arch, model, groups=groups, padded_vocab_size=padded)
    chunks = [chunk.to(device) for chunk in chunks]
    nbytes = sum(tensor.nbytes for _, tensor in export_hf_tensors(chunks, arch, groups))
    transports: dict[str, Transport] = {
        "disk": DiskTransport(folder / "disk"),
        "tensor": TensorTransport(),
        "distributed": DistributedTransport(device),
    }
    syncs = {
        name: WeightSync(
            SGLangEngine(arch.vocab_size, groups.mp),
            transport,
            arch,
            groups,
            source=model,
            folder=folder / name,
            servers=None,
            urls=urls,
            api_key=None,
            options={"outage_timeout": 600.0},
            say=print,
        )
        for name, transport in transports.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in syncs}
    for repeat in range(repeats + 1):
        for name, sync in syncs.items():
            start = time.perf_counter()
            sync.push(chunks, repeat)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    for sync in syncs.values():
        sync.close()
    return seconds, nbytes


def start_servers(python: Path, count: int, model: Path, precision: str, folder: Path) -> Servers:
    """Servers of the model on this machine."""
    settings = ServerSettings(
        python=python,
        count=count,
        dtype={"bf16": "bfloat16", "fp32": "float32"}[precision],
        longest=256,
        concurrency=8,
        start_timeout=900.0,
    )
    servers = Servers(settings, folder, print)
    servers.start(model, "0")
    return servers


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--python", type=Path, help="interpreter that has SGLang")
    where.add_argument("--urls", nargs="+", help="servers that run already")
    parser.add_argument("--servers", type=int, default=1, help="how many to start")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="one repeat")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    cpu.install()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory()))
        urls = options.urls
        if urls is None:
            servers = start_servers(
                options.python, options.servers, options.model, options.precision, folder / "servers"
            )
            ending.callback(servers.stop)
            urls = servers.urls
        repeats = 1 if options.smoke else options.repeats
        seconds, nbytes = measure(options.model, urls, options.precision, repeats, folder)
    title = f"{nbytes / 1e6:.1f} MB of {options.precision} to {len(urls)} server(s), {repeats} pushes each"
    table = Table("transport", "fastest s", "median s", "MB/s (median)", title=title)
    for name, taken in seconds.items():
        median = statistics.median(taken)
        table.add_row(name, f"{min(taken):.3f}", f"{median:.3f}", f"{nbytes / median / 1e6:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
