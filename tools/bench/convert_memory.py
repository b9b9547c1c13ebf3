"""Peak memory and speed of the checkpoint conversion, on a synthetic checkpoint of any size.

Usage: python -m tools.bench.convert_memory FOLDER [--layers N] [--hidden N] [--ffn N] [--vocab N]

Writes a Hugging Face folder of random bf16 weights (Llama, several files) under FOLDER, converts it to a Megatron
folder and back, and prints for both directions how much anonymous memory (RssAnon: what cannot be dropped and read
again from a file) the process took at its peak beyond what it had before, beside the largest tensor, and bytes per
second. The folders are left there.
"""

import argparse
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from megatron_opd.checkpoint.convert import hf_to_megatron, megatron_to_hf, plan_hf_to_megatron
from megatron_opd.checkpoint.pieces import model_pieces
from megatron_opd.checkpoint.safetensors_files import SafetensorsFiles, TensorSpec
from megatron_opd.models.architecture import read_architecture

HEAD_DIM = 128


@dataclass(frozen=True)
class Measured:
    """What one direction took."""

    peak_bytes: int
    seconds: float
    model_bytes: int
    largest_bytes: int


def anonymous_bytes() -> int:
    """RssAnon of this process. Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


class AnonymousPeak(AbstractContextManager["AnonymousPeak"]):
    """`with AnonymousPeak() as peak:` leaves in `peak.growth` how far RssAnon rose above its value at the start.

    A thread looks every 2 milliseconds.
    """

    growth = 0

    def __enter__(self) -> Self:
        self._before = anonymous_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self.growth = max(self.growth, anonymous_bytes() - self._before)


def write_synthetic(
    folder: Path, *, layers: int, hidden: int, ffn: int, vocab: int, file_bytes: int = 10**9
) -> None:
    """Write a Hugging Face folder with random bf16 weights, one tensor at a time."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": max(1, hidden // HEAD_DIM // 4),
        "head_dim": HEAD_DIM,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {
        name: shape for piece in model_pieces(read_architecture(folder)) for name, shape in piece.hf.items()
    }
    specs = [TensorSpec(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    files = SafetensorsFiles(folder, specs, file_bytes)
    files.create()
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)
        files.write(name, (bits & 0x3FFF).view(torch.bfloat16))  # positive, finite, below 2


def measure(source: Path, megatron: Path, back: Path) -> dict[str, Measured]:
    """Convert `source` to `megatron` and that to `back`; what each direction took.

    Each runs in a process of its own: memory that an earlier one has freed would hide what the next one takes.
    """
    sizes = plan_hf_to_megatron(source).sizes
    calls = {
        "hf-to-megatron": (hf_to_megatron, source, megatron),
        "megatron-to-hf": (megatron_to_hf, megatron, back),
    }
    results = {}
    for name, call in calls.items():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            peak, seconds = fresh.submit(_converted, *call).result()
        results[name] = Measured(peak, seconds, sum(sizes), max(sizes))
    return results


def _converted(convert: Callable[[Path, Path], None], source: Path, target: Path) -> tuple[int, float]:
    """Peak growth of anonymous memory in bytes, and seconds."""
    began = time.perf_counter()
    with AnonymousPeak() as peak:
        convert(source, target)
    return peak.growth, time.perf_counter() - began


def main() -> None:
    """Make the checkpoint, convert it both ways, print what it took."""
    parser = argparse.ArgumentParser(description="Peak memory and speed of the checkpoint conversion.")
    parser.add_argument("folder", type=Path, help="where to write; about three times the model's size")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=128256)
    given = parser.parse_args()
    source = given.folder / "hf"
    write_synthetic(source, layers=given.layers, hidden=given.hidden, ffn=given.ffn, vocab=given.vocab)
    for name, took in measure(source, given.folder / "megatron", given.folder / "back").items():
        print(
            f"{name}: {took.model_bytes / 1e9:.2f} GB in {took.seconds:.1f} s "
            f"({took.model_bytes / took.seconds / 1e6:.0f} MB/s), peak RssAnon +{took.peak_bytes / 1e6:.0f} MB, "
            f"largest tensor {took.largest_bytes / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    main()
