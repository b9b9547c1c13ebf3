"""SGLang servers of a run on a machine of their own: `megatron-opd serve`.

The run on other machines gives those that draw rollouts their weights; until then they have those of student.path.
"""

import os
import signal
import socket
import sys
import time
from dataclasses import replace
from types import FrameType

import torch

from megatron_opd.config.schema import Config
from megatron_opd.data.tokenizer import load_tokenizer, stop_ids
from megatron_opd.errors import UserError
from megatron_opd.evaluation.standalone import EvaluatedTexts
from megatron_opd.evaluation.tasks import read_tasks
from megatron_opd.models.architecture import read_served
from megatron_opd.rollout.server_start import ServerSettings
from megatron_opd.rollout.servers import LOOPBACK, Servers
from megatron_opd.training.serving import rollout_server_settings, teacher_server_settings
from megatron_opd.watch.stopping import SIGNALS


def serve(config: Config, role: str, port: int) -> None:
    """Start the servers of `role`, "rollout" or "teacher", at `port` and those after it, until SIGTERM or SIGINT.

    They listen on all interfaces, ask for the key in SGLANG_API_KEY and share all GPUs of the machine. One that ends is
    started again. In a step of a SLURM job, unless at a terminal, only SIGKILL ends them. Raises Outage when they do
    not start; exits with code 1 when none is left.
    """
    settings = machine_settings(config, role)
    path = config.student.path if role == "rollout" else config.teacher.folder
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"{'student' if role == 'rollout' else role}.path: {path} has no *.safetensors for the servers to load: "
            "name a Hugging Face folder (megatron-opd convert megatron-to-hf writes one)"
        )
    key = os.environ.get("SGLANG_API_KEY")
    if not key:
        raise UserError(
            "SGLANG_API_KEY: set this variable to the key that servers ask for, here and for the run"
        )
    machine = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    servers = Servers(
        settings,
        config.run_dir / "servers" / f"{role}-{machine}",
        lambda line: print(f"{machine}: {line}", flush=True),
        api_key=key,
        first_port=port,
        others_update=role == "rollout",
    )
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # only a scheduler sends it
    signal.signal(signal.SIGTERM, _end)
    if "SLURM_STEP_ID" in os.environ and not os.isatty(0):
        # What is sent to a job comes to every step, and the ranks may need their servers for the step that they save
        # after. srun ends these by SIGKILL, at the end of the script or when it is told to stop.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    servers.start(path, "as started")
    try:
        while not servers.given_up:
            time.sleep(1.0)
        print(f"{machine}: no server of {settings.key} is left", file=sys.stderr)
        raise SystemExit(1)
    finally:
        servers.stop()


def machine_settings(config: Config, role: str) -> ServerSettings:
    """The settings of servers that have a machine to themselves."""
    section = config.rollout if role == "rollout" else config.teacher
    if section.engine != "sglang" or section.sglang.python is None:
        raise UserError(
            f"{role}.sglang.python: set it, and {role}.engine to sglang: nothing to start servers with"
        )
    if role == "rollout":
        path, served = config.student.path, read_served(config.student.path)
        tokenizer = load_tokenizer(path)
        tasks = read_tasks(config, tokenizer, served.max_positions)
        texts = EvaluatedTexts(tokenizer, served.vocab_size, stop_ids(path, tokenizer), tasks)
        settings = rollout_server_settings(config, texts)
    else:
        settings = teacher_server_settings(config)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus % settings.count:
        raise UserError(
            f"{role}.sglang.servers: {settings.count} servers do not share the {gpus} GPUs of this machine: choose a "
            "divisor"
        )
    host = "0.0.0.0" if settings.host in LOOPBACK else settings.host
    return replace(settings, host=host, gpus=tuple(range(gpus)))


def _end(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
