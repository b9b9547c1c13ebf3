"""The servers of a run whose rollouts SGLang draws: started with the student's weights, kept in step, and ended."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import PreTrainedTokenizerBase

from megatron_opd.config.rollout import RolloutConfig, SGLangConfig
from megatron_opd.config.schema import Config
from megatron_opd.data.rollouts import Rollout
from megatron_opd.evaluation.tasks import Task, longest_sequence
from megatron_opd.models.architecture import Architecture
from megatron_opd.models.gpt import GPT
from megatron_opd.rollout.replicas import WeightsLost
from megatron_opd.rollout.server_start import ServerSettings
from megatron_opd.rollout.servers import Servers
from megatron_opd.rollout.sglang import SGLangEngine
from megatron_opd.rollout.sharded import RolloutEngine
from megatron_opd.watch.phases import Phases
from megatron_opd.weight_sync.disk import DiskTransport
from megatron_opd.weight_sync.distributed import DistributedTransport
from megatron_opd.weight_sync.sync import WeightSync
from megatron_opd.weight_sync.tensor import TensorTransport
from megatron_opd.weight_sync.transport import Transport

SAMPLING_MASK = 4096  # ids of a cut that SGLang tells by itself

Publish = Callable[[int], float]
"""`publish(step)` has all later rollouts drawn with the weights of now; returns the seconds it took."""


class ServedTexts(Protocol):
    """What servers, their client and an evaluation have to know of the tokens."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def tasks(self) -> list[Task]: ...


class ServedChunks(Protocol):
    """This rank's part of a model."""

    @property
    def chunks(self) -> Sequence[GPT]: ...


class Served(Protocol):
    """What servers are given the weights of: the student of a job, or a model that is evaluated."""

    @property
    def config(self) -> Config: ...
    @property
    def architecture(self) -> Architecture: ...
    @property
    def groups(self) -> ProcessGroupCollection: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def student(self) -> ServedChunks: ...
    @property
    def texts(self) -> ServedTexts: ...
    @property
    def engine(self) -> RolloutEngine: ...
    @property
    def phases(self) -> Phases: ...


def drawn(draw: Callable[[], list[Rollout]], publish: Publish, step: int) -> list[Rollout]:
    """What `draw` returns; once more if servers have restarted without the weights of `step`, which they get again."""
    try:
        return draw()
    except WeightsLost:
        publish(step)
        return draw()


def unserved(step: int) -> float:
    """The `Publish` of rollouts that the training processes draw themselves: they have the weights anyway."""
    return 0.0


@contextmanager
def serving(job: Served, say: Callable[[str], None]) -> Iterator[Publish]:
    """`with serving(job, say) as publish:` then `publish(step)` comes before rollouts with new weights.

    `step` is the optimizer steps behind the weights. The first call, before the first rollout, starts the servers.
    `say` prints a line. At the end, and after any error, the servers that the run has started are ended. `publish` is
    collective, see `WeightSync.push`.
    """
    engine = job.engine
    if not isinstance(engine, SGLangEngine):
        yield unserved
        return
    sync = build_sync(job, engine, say)

    def publish(step: int) -> float:
        began = time.perf_counter()
        sync.push(job.student.chunks, step)
        return time.perf_counter() - began

    try:
        yield publish
    finally:
        sync.close()


def build_sync(job: Served, engine: SGLangEngine, say: Callable[[str], None]) -> WeightSync:
    """The weight sync of this rank; rank 0's has the servers that the run starts, if it does."""
    config = job.config.rollout.sglang
    folder = job.config.run_dir / "servers"
    servers = None
    if not config.urls and dist.get_rank() == 0:
        settings = rollout_server_settings(job.config, job.texts)
        servers = Servers(settings, folder, say)
    return WeightSync(
        engine,
        transport(job, folder / "weights"),
        job.architecture,
        job.groups,
        source=job.config.student.path,
        folder=folder / "weights",
        servers=servers,
        urls=config.urls,
        api_key=os.environ.get("SGLANG_API_KEY") if config.urls else None,
        options=client_options(config),
        say=say,
    )


def transport(job: Served, folder: Path) -> Transport:
    """What `rollout.weight_sync` names; exports go to `folder`."""
    match job.config.rollout.weight_sync:
        case "disk":
            return DiskTransport(folder)
        case "tensor":
            return TensorTransport()
        case "distributed":
            return DistributedTransport(job.device)


def client_options(config: SGLangConfig) -> dict[str, Any]:
    """How these servers are asked: options of `Replicas`."""
    return {
        "concurrency": config.concurrency,
        "request_timeout": config.request_timeout,
        "outage_timeout": config.outage_timeout,
    }


def rollout_server_settings(config: Config, texts: ServedTexts) -> ServerSettings:
    """How servers that draw the rollouts and the responses to tasks are started."""
    settings = server_settings(config, config.rollout.sglang)
    return replace(
        settings,
        stop_ids=texts.stop_ids,
        longest=max(settings.longest, longest_sequence(texts.tasks, config.rollout)),
        arguments=(*settings.arguments, *mask_arguments(config.rollout, texts.vocab_size)),
    )


def teacher_server_settings(config: Config) -> ServerSettings:
    """How servers of the teacher are started."""
    settings = server_settings(config, config.teacher.sglang)
    return replace(settings, longest=teacher_longest(config), key="teacher.sglang")


def teacher_longest(config: Config) -> int:
    """Tokens of the longest prompt of the teacher with the longest response."""
    return config.teacher_prompt_tokens + config.rollout.max_new_tokens


def server_settings(config: Config, served: SGLangConfig) -> ServerSettings:
    """How the servers of a section `sglang` are started, whatever they are for."""
    assert served.python is not None
    return ServerSettings(
        python=served.python,
        count=served.servers,
        dtype={"bf16": "bfloat16", "fp32": "float32"}[config.precision],
        longest=config.data.max_prompt_tokens + config.rollout.max_new_tokens,
        concurrency=served.concurrency,
        start_timeout=served.outage_timeout,
        host=served.host,
        gpus=tuple(served.gpus),
        arguments=tuple(served.arguments),
    )


def mask_arguments(rollout: RolloutConfig, vocab_size: int) -> tuple[str, ...]:
    """What lets a server say which ids a cut kept, however many; ids as likely as the last of top-k may be more."""
    if rollout.top_p == 1 and rollout.top_k == 0:
        return ()
    limit = max(2 * rollout.top_k, SAMPLING_MASK) if rollout.top_k else vocab_size
    return ("--sampling-mask-max-tokens", str(min(limit, vocab_size)))
