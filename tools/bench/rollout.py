"""Rollout speed of `LocalEngine` against transformers' `generate`: same weights, prompts and machine, in one run.

    python -m tools.bench.rollout [--model FOLDER] [--precision fp32 bf16] [--threads 2] [--repeats 5]

One process; without `--model` a Llama with random weights in the shape of SmolLM2-135M with 24 layers. Both sample at
temperature 1 from the whole vocabulary and never stop early. The runs alternate and the fastest of each counts, so
that other work on the machine disturbs little.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_opd.checkpoint.weights import load_model_weights
from megatron_opd.data.prompts import Prompt
from megatron_opd.models.architecture import read_architecture
from megatron_opd.models.gpt import DTYPES, build_gpt
from megatron_opd.parallel import cpu
from megatron_opd.parallel.groups import ParallelLayout, build_groups
from megatron_opd.rollout.local import LocalEngine
from megatron_opd.rollout.sampling import Sampling


def write_random_model(folder: Path) -> Path:
    """SmolLM2-135M's shape with 24 of its 30 layers, random weights."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=24,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        rope_theta=100000.0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_prompts(count: int, vocab_size: int) -> list[Prompt]:
    """Random prompts of 30, 33, ... tokens."""
    generator = torch.Generator().manual_seed(0)
    return [
        Prompt(str(row), torch.randint(5, vocab_size, (30 + 3 * row,), generator=generator).tolist(), "")
        for row in range(count)
    ]


def our_call(folder: Path, precision: str, prompts: list[Prompt], new_tokens: int) -> Callable[[int], None]:
    """`call(seed)` generates with LocalEngine."""
    layout = ParallelLayout()
    groups = build_groups(layout)
    arch = read_architecture(folder)
    padded = arch.padded_vocab_size(1)
    chunks = build_gpt(arch, layout, groups, precision=precision, padded_vocab_size=padded)
    load_model_weights(chunks, arch, folder, groups=groups, padded_vocab_size=padded)
    engine = LocalEngine(chunks, arch, groups)

    def call(seed: int) -> None:
        rollouts = engine.generate(prompts, Sampling(max_new_tokens=new_tokens, seed=seed), 0)
        assert all(len(rollout.response_ids) == new_tokens for rollout in rollouts)

    return call


def transformers_call(
    folder: Path, precision: str, prompts: list[Prompt], new_tokens: int
) -> Callable[[int], None]:
    """`call(seed)` generates with transformers: left-padded batch, dynamic cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision]).eval()
    model.generation_config.eos_token_id = None
    longest = max(len(prompt.token_ids) for prompt in prompts)
    padding = [longest - len(prompt.token_ids) for prompt in prompts]
    ids = torch.tensor([[0] * pad + prompt.token_ids for pad, prompt in zip(padding, prompts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])

    def call(seed: int) -> None:
        torch.manual_seed(seed)
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )
        assert out.size(1) == longest + new_tokens

    return call


def fastest(calls: dict[str, Callable[[int], None]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest of `repeats` alternating runs of each, after one run that does not count."""
    best = dict.fromkeys(calls, float("inf"))
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call(repeat)
            if repeat:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="Hugging Face folder (default: random weights)")
    parser.add_argument("--precision", nargs="+", choices=sorted(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu.install()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    table = Table("precision", "engine", "seconds", "tokens/s", "x transformers")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.model or write_random_model(Path(temporary))
        prompts = make_prompts(args.prompts, read_architecture(folder).vocab_size)
        for precision in args.precision:
            options = (folder, precision, prompts, args.new_tokens)
            seconds = fastest(
                {"LocalEngine": our_call(*options), "transformers": transformers_call(*options)}, args.repeats
            )
            for name, best in seconds.items():
                speed = args.prompts * args.new_tokens / best
                ratio = seconds["transformers"] / best
                table.add_row(precision, name, f"{best:.2f}", f"{speed:.0f}", f"{ratio:.2f}")
    Console().print(table)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
