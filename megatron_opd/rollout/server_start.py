"""What an SGLang server is started with: its command line, its environment with the GPUs it gets, and its port."""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

PARALLELISM = {
    "--tp",
    "--tp-size",
    "--tensor-parallel-size",
    "--pp",
    "--pp-size",
    "--pipeline-parallel-size",
    "--dp",
    "--dp-size",
    "--data-parallel-size",
}
"""Arguments of sglang.launch_server that say how a server uses several GPUs."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How the servers of a run are started."""

    python: Path  # interpreter of the environment that has SGLang
    count: int
    dtype: str  # "float32" or "bfloat16"
    longest: int  # tokens of a prompt with its response at most
    concurrency: int  # requests in flight at a server at most
    stop_ids: tuple[int, ...] = ()  # ids that end a response; those of the model's files besides
    start_timeout: float  # seconds from start to the first answer
    host: str = "127.0.0.1"
    gpus: tuple[int, ...] = ()  # as this process counts them; a multiple of `count`. Empty: SGLang chooses
    arguments: tuple[str, ...] = ()  # further arguments of sglang.launch_server
    key: str = "rollout.sglang"  # section of the configuration, which errors name

    def gpus_of(self, index: int) -> tuple[int, ...]:
        """The GPUs of a server: each gets as many, in order."""
        each = len(self.gpus) // self.count
        return self.gpus[index * each : (index + 1) * each]


def server_command(
    settings: ServerSettings, model: Path, version: str, port: int, key_file: Path | None
) -> list[str]:
    """The command line of a server that starts with the weights of `model`. The user's arguments come last."""
    arguments = {
        "--model-path": str(model),
        "--weight-version": version,
        "--host": settings.host,
        "--port": str(port),
        "--dtype": settings.dtype,
        # SGLang keeps a few positions for itself.
        "--context-length": str(settings.longest + 8),
    }
    if not torch.cuda.is_available():
        arguments |= {
            "--device": "cpu",
            "--attention-backend": "torch_native",
            # By itself SGLang takes most of the host's memory for its cache.
            "--max-total-tokens": str(settings.concurrency * (settings.longest + 8)),
        }
    if (
        len(settings.gpus_of(0)) > 1
        and not {word.partition("=")[0] for word in settings.arguments} & PARALLELISM
    ):
        arguments["--tp-size"] = str(len(settings.gpus_of(0)))
    if settings.stop_ids:  # instead of config.json's, which may say otherwise
        arguments["--json-model-override-args"] = json.dumps({"eos_token_id": settings.stop_ids})
    flags = ["--skip-tokenizer-init", "--sleep-on-idle", "--log-level-http", "warning"]
    if key_file is not None:
        flags += ["--config", str(key_file)]
    pairs = [word for pair in arguments.items() for word in pair]
    module = [str(settings.python), "-m", "sglang.launch_server"]
    return [*module, *flags, *pairs, *settings.arguments]


def server_environment(
    settings: ServerSettings, index: int, number: int, parent: Mapping[str, str]
) -> dict[str, str]:
    """The environment of the server at `index`, made of that of this process, `parent`.

    `number` tells the servers of all sets apart: on a machine without a GPU each computes on a core of its own.
    """
    found = {
        **_without_ranks(parent),
        "HF_HUB_OFFLINE": "1",
        # The context is a few tokens longer than the longest sequence, perhaps than the model's positions.
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
    }
    if not torch.cuda.is_available():
        cores = sorted(os.sched_getaffinity(0))
        found |= {
            "SGLANG_USE_CPU_ENGINE": "1",
            # Threads that share a core with other work wait for each other most of the time: a core a server.
            # SGLang reads the second line where its own kernels are, the first holds everywhere.
            "OMP_NUM_THREADS": "1",
            "SGLANG_CPU_OMP_THREADS_BIND": str(cores[number % len(cores)]),
        }
    gpus = settings.gpus_of(index)
    if gpus:
        visible = parent.get("CUDA_VISIBLE_DEVICES")
        names = [str(gpu) if visible is None else visible.split(",")[gpu].strip() for gpu in gpus]
        found["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    return found


def hold_port(host: str, port: int = 0) -> tuple[socket.socket, int]:
    """A socket that never listens, and its port of `host`, 0: a free one. Until it is closed nobody else is given it.

    A server that sets SO_REUSEADDR, as SGLang's does, can listen there all the same.
    """
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((host, port))
    return held, int(held.getsockname()[1])


def _without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what makes a process a rank of the training."""
    ranks = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "PYTHONPATH",
    )
    prefixes = ("TORCHELASTIC_", "GROUP_", "ROLE_", "OMP_")
    return {
        name: value
        for name, value in environment.items()
        if name not in ranks and not name.startswith(prefixes)
    }
