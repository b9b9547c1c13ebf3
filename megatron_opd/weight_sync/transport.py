"""What a transport of weights is given and has to do: `Outgoing`, the weights of one push, and `Transport`.

The Hugging Face tensors of the student stream through rank 0, bucket by bucket; nothing here holds the whole model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_opd.checkpoint.hf_export import export_hf_tensors, save_hf, takes_part
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import Architecture
from megatron_opd.models.gpt import GPT
from megatron_opd.rollout.replicas import BadReply, Body
from megatron_opd.weight_sync.checksums import SampleChecksums

# Bytes of tensors that are on their way together. Encoded for HTTP they exist about four times over in the trainer and
# as often in a server; larger buckets are hardly faster. A tensor is never cut: a larger one is a bucket of its own.
BUCKET_BYTES = 64 << 20

Bucket = list[tuple[str, Tensor]]
Trouble = BadReply | UserError  # what a request to a server raised; UserError where it refused


class Abandoned(BadReply):
    """A server did not get the weights, but through no fault of its own."""


class Ask(Protocol):
    """`SGLangEngine.ask`."""

    def __call__(self, path: str, bodies: Mapping[str, Body]) -> dict[str, Any]: ...


class Transport(Protocol):
    """How the weights of a push reach servers: `disk`, `tensor` or `distributed`."""

    def send(self, weights: "Outgoing", ask: Ask, urls: Sequence[str]) -> dict[str, Trouble]:
        """Have the servers at `urls` load the weights; their caches and their versions are the caller's.

        `urls` and the result are rank 0's: which servers did not, and why; these may have loaded some of the tensors.
        Collective over the model's ranks; raises UserError on all alike.
        """
        ...


@dataclass
class Outgoing:
    """The weights of one push. `sample`, on rank 0 where checksums are due, is filled as they go out."""

    chunks: Sequence[GPT]
    arch: Architecture
    groups: ProcessGroupCollection
    source: Path  # of config.json and the tokenizer of an export
    version: str
    sample: SampleChecksums | None = None
    exported: Path | None = None  # the folder that `export` has written

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder, see `save_hf`. Collective over the model's ranks."""
        save_hf(self.chunks, self.arch, self.groups, self.source, folder, replace=True)
        self.exported = folder
        if self.sample is not None:
            self.sample.add_folder(folder)

    def buckets(self) -> Iterator[Bucket]:
        """On rank 0 the Hugging Face tensors, cast to the model's dtype, in buckets; elsewhere nothing.

        Collective over the model's ranks, see `export_hf_tensors`: every rank exhausts it.
        """
        if not takes_part(self.groups):
            return
        dtype = next(self.chunks[0].parameters()).dtype
        bucket: Bucket = []
        size = 0
        if self.sample is not None:
            self.sample.clear()
        for name, tensor in export_hf_tensors(self.chunks, self.arch, self.groups):
            if dist.get_rank() > 0:
                continue
            tensor = tensor.detach().to(dtype)
            if self.sample is not None:
                self.sample.add(name, tensor)
            if bucket and size + tensor.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append((name, tensor))
            size += tensor.nbytes
        if bucket:
            yield bucket


def troubles_of(answers: Mapping[str, Any]) -> dict[str, Trouble]:
    """By URL, what is wrong with the answers to a request that has the servers change something."""
    troubles: dict[str, Trouble] = {}
    for url, answer in answers.items():
        if isinstance(answer, BadReply | UserError):
            troubles[url] = answer
        elif field(answer, "success") is not True:
            troubles[url] = BadReply(str(answer)[:200])
    return troubles


def field(answer: Any, name: str) -> Any:
    """A field of an answer; None when the server gave another answer."""
    return answer.get(name) if isinstance(answer, dict) else None


def shards_of(ask: Ask, urls: Sequence[str]) -> dict[str, int]:
    """How many processes of each server hold a shard of every layer; servers that do not say so are left out."""
    answers = ask("/server_info", dict.fromkeys(urls))
    sizes = {url: field(answer, "tp_size") for url, answer in answers.items()}
    return {url: size for url, size in sizes.items() if isinstance(size, int)}
