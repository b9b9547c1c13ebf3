"""Time and memory of the objectives against straightforward implementations and hardware floors, in one run.

    python -m tools.bench.objectives [--tokens 1024] [--vocab 49152] [--tp 2] [--threads 2] [--repeats 5]

1. Reverse KL from logits, forward and backward, on --tp gloo processes that share --threads: ours against
   `tools.bench.straightforward`. All must agree, or the run fails.
2. linear_divergence against the matrix products that it cannot do without, in the same chunks, and against heads
   that keep their logits; its peak memory at three sizes.
3. topk_divergence against dense log-softmax and topk.
4. Token weights and their scan against linear_divergence on as many tokens.

Runs alternate, times are medians, ratios are medians over rounds. Memory is the peak of what a call has
allocated, without its arguments and what it returns, counted exactly (`measure.peak_extra`). On a GPU everything
runs in one process, section 1 also prints the share of a device copy's bytes/s, and the defaults are 8192 tokens,
151936 ids and hidden size 4096. --only picks sections.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor

from megatron_opd.objectives import (
    segmented_prefix_sums,
    token_weights,
    topk_divergence,
    vocab_parallel_divergence,
)
from megatron_opd.objectives.linear_divergence import DEFAULT_CHUNK
from megatron_opd.parallel import cpu
from tools.bench import straightforward
from tools.bench.heads import Head, with_gradient
from tools.bench.measure import Call, alternate, median_ratio, peak_extra, show, table_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RESPONSES = 16  # that the packed positions of section 4 belong to


@dataclass(frozen=True)
class Sizes:
    """What the command line fixes."""

    tokens: int
    vocab: int
    hidden: tuple[int, ...]
    precision: tuple[str, ...]
    chunk: int
    k: int
    positions: int
    tp: int
    threads: int
    repeats: int
    step_seconds: float
    device: str

    def head(self, precision: str, hidden: int, *, tokens: int = 0, vocab: int = 0, chunk: int = 0) -> Head:
        """Of these sizes; 0: as on the command line."""
        return Head(
            tokens or self.tokens,
            vocab or self.vocab,
            hidden,
            chunk or self.chunk,
            DTYPES[precision],
            self.device,
        )


def draw_logits(tokens: int, width: int, precision: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(student, teacher, incoming gradient), the teacher not far from the student."""
    student = 3.0 * torch.randn(tokens, width, device=device)
    teacher = student + torch.randn(tokens, width, device=device)
    dtype = DTYPES[precision]
    return student.to(dtype), teacher.to(dtype), torch.rand(tokens, device=device)


# 1. Reverse KL from logits


def reverse_kl(sizes: Sizes) -> None:
    """On every rank of the process group, or of a single process."""
    group = dist.group.WORLD if dist.is_initialized() else None
    ranks = 1 if group is None else dist.get_world_size()

    def ours(student: Tensor, teacher: Tensor, upstream: Tensor, inplace: bool = False) -> tuple[Tensor, ...]:
        student = student.detach().requires_grad_()
        stats = vocab_parallel_divergence(student, teacher, group=group, inplace_backward=inplace)
        return with_gradient(stats.divergence, upstream, student)

    calls: dict[str, Call] = {
        "ours": ours,
        "ours, gradient in place": partial(ours, inplace=True),
        "autograd, 6 collectives": straightforward.autograd_reverse_kl,
        "saved softmax, 5": straightforward.saved_softmax_reverse_kl,
        "gathered logits, 2": straightforward.gathered_reverse_kl,
    }
    for precision in sizes.precision:
        torch.manual_seed(dist.get_rank() if group is not None else 0)
        student, teacher, upstream = draw_logits(sizes.tokens, sizes.vocab // ranks, precision, sizes.device)
        if group is not None:
            dist.broadcast(upstream, 0)
        title = f"reverse KL, {sizes.tokens} tokens, {sizes.vocab} ids on {ranks} ranks, {precision}"
        prepare = partial(_with_own_student, student, teacher, upstream)
        table, seconds = table_of(title, calls, prepare, precision, sizes.repeats)
        if sizes.device == "cuda":
            _add_copy(table, seconds["ours, gradient in place"], student, teacher, sizes.repeats)
        show(table)


def _with_own_student(student: Tensor, teacher: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A student that a call may overwrite."""
    return student.clone(), teacher, upstream


def _add_copy(table: Table, seconds: list[float], student: Tensor, other: Tensor, repeats: int) -> None:
    """What a device copy would take for the five times that logits are read or written."""
    target = torch.empty_like(student)
    copies = statistics.median(alternate({"": partial(target.copy_, other)}, repeats)[""])
    five = 5.0 / 2.0 * copies
    share = five / statistics.median(seconds)
    bandwidth = 2e-9 * student.numel() * student.element_size() / copies
    table.caption = (
        f"device copy: {bandwidth:.0f} GB/s; 5 passes over the logits at that speed: {1e3 * five:.2f} ms, "
        f"{100 * share:.0f} % of ours in place"
    )


def start(threads: int) -> None:
    """Settings of every process: threads, and freed memory kept as in training, so that nobody pays page faults."""
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    torch.set_num_threads(threads)
    cpu.install()


def _one_rank(rank: int, sizes: Sizes, folder: str) -> None:
    start(max(1, sizes.threads // sizes.tp))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=sizes.tp)
    reverse_kl(sizes)
    dist.destroy_process_group()


def sharded_reverse_kl(sizes: Sizes) -> None:
    """Section 1 on sizes.tp processes; in this process if that is one."""
    if sizes.tp == 1:
        reverse_kl(sizes)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_one_rank, (sizes, folder), sizes.tp)


# 2. From hidden states


def linear(sizes: Sizes) -> None:
    """Time against the floor for every hidden size, then memory at three sizes."""
    for precision in sizes.precision:
        for hidden in sizes.hidden:
            head = sizes.head(precision, hidden)
            calls = {
                "linear_divergence": head.fused,
                "whole logits, ours": head.kept_logits,
                "whole logits, autograd": head.autograd,
            }
            floors: dict[str, Call] = {
                "its six products": head.floor,
                "the four of whole logits": partial(head.floor, chunked=False),
            }
            title = (
                f"from hidden states [{sizes.tokens}, {hidden}], {sizes.vocab} ids, chunks of {head.chunk}, "
                f"{precision}"
            )
            table, seconds = table_of(title, calls, tuple, precision, sizes.repeats, floors)
            ours, six = seconds["linear_divergence"], seconds["its six products"]
            table.caption = (
                f"linear_divergence / its six products: {median_ratio(ours, six):.2f} "
                f"(fastest of each: {min(ours) / min(six):.2f})"
            )
            show(table)
    linear_memory(sizes)


def linear_memory(sizes: Sizes) -> None:
    """Peak memory where N and V grow and chunk * V does not."""
    table = Table("", "N", "V", "chunk", "extra MiB", title="peak memory of linear_divergence")
    tokens, chunk = sizes.tokens, max(4, min(sizes.chunk, sizes.tokens))
    hidden = sizes.hidden[0]
    for precision in sizes.precision:
        for count, vocab, size in (
            (tokens, sizes.vocab, chunk),
            (4 * tokens, sizes.vocab, chunk),
            (tokens, 4 * sizes.vocab, chunk // 4),
        ):
            head = sizes.head(precision, hidden, tokens=count, vocab=vocab, chunk=size)
            main_grad = torch.zeros(vocab, hidden, device=sizes.device)
            for name, buffer in (("", None), (", weight_grad given", main_grad)):
                extra = peak_extra(partial(head.fused, buffer))
                table.add_row(f"{precision}{name}", str(count), str(vocab), str(size), f"{extra / 2**20:.1f}")
    show(table)


# 3. Top-K


def topk(sizes: Sizes) -> None:
    """Teacher's best K ids, renormalised."""

    def ours(student: Tensor, teacher: Tensor, upstream: Tensor, inplace: bool = False) -> tuple[Tensor, ...]:
        student = student.detach().requires_grad_()
        stats = topk_divergence(student, teacher, k=sizes.k, inplace_backward=inplace)
        return with_gradient(stats.divergence, upstream, student)

    calls: dict[str, Call] = {
        "ours": ours,
        "ours, gradient in place": partial(ours, inplace=True),
        "log-softmax, topk": partial(straightforward.dense_topk_reverse_kl, k=sizes.k),
    }
    for precision in sizes.precision:
        torch.manual_seed(0)
        student, teacher, upstream = draw_logits(sizes.tokens, sizes.vocab, precision, sizes.device)
        # Without ties at the edge of the support, which each implementation breaks in its own way.
        best = torch.rand_like(teacher, dtype=torch.float32).topk(sizes.k + 1).indices
        teacher.scatter_(
            1, best, 32.0 + 0.25 * torch.arange(sizes.k + 1.0).expand(sizes.tokens, -1).to(teacher)
        )
        title = f"top-{sizes.k} reverse KL, {sizes.tokens} tokens, {sizes.vocab} ids, {precision}"
        prepare = partial(_with_own_student, student, teacher, upstream)
        show(table_of(title, calls, prepare, precision, sizes.repeats)[0])


# 4. Token weights


def weights(sizes: Sizes) -> None:
    """Packed responses of equal length, a tenth of the positions masked."""
    torch.manual_seed(0)
    gap = torch.randn(sizes.positions, device=sizes.device)
    mask = torch.rand(sizes.positions, device=sizes.device) > 0.1
    cu_seqlens = torch.linspace(0, sizes.positions, RESPONSES + 1).long().to(sizes.device)
    head = sizes.head(sizes.precision[-1], sizes.hidden[0], tokens=sizes.positions)
    calls: dict[str, Callable[[], Any]] = {
        "linear_divergence": head.fused,
        "token_weights": partial(token_weights, gap, mask, cu_seqlens),
        "token_weights, unit_mean": partial(token_weights, gap, mask, cu_seqlens, unit_mean=True),
        "its prefix sums": partial(segmented_prefix_sums, gap, cu_seqlens),
    }
    seconds = alternate(calls, sizes.repeats)
    title = f"{sizes.positions} positions, {RESPONSES} responses, {sizes.vocab} ids, {sizes.precision[-1]}"
    table = Table("", "ms", "% of linear_divergence", f"% of {sizes.step_seconds:g} s step", title=title)
    for name, taken in seconds.items():
        share = median_ratio(taken, seconds["linear_divergence"])
        of_step = statistics.median(taken) / sizes.step_seconds
        table.add_row(
            name, f"{1e3 * statistics.median(taken):.2f}", f"{100 * share:.3f}", f"{100 * of_step:.3f}"
        )
    show(table)


SECTIONS: dict[str, Callable[[Sizes], None]] = {
    "reverse_kl": sharded_reverse_kl,
    "linear": linear,
    "topk": topk,
    "weights": weights,
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--tokens", type=int, default=8192 if gpu else 1024)
    parser.add_argument("--vocab", type=int, default=151936 if gpu else 49152)
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096] if gpu else [576, 2048])
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--chunk", type=int, default=DEFAULT_CHUNK, help="tokens of linear_divergence's chunks"
    )
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--tp", type=int, default=1 if gpu else 2, help="processes of section 1 (1 on a GPU)")
    parser.add_argument("--threads", type=int, default=2, help="of all processes together")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--step-seconds", type=float, default=3.5, help="of a step (tools.bench.step)")
    options = vars(parser.parse_args(argv))
    chosen = options.pop("only")
    if gpu and options["tp"] != 1:
        parser.error("--tp: one GPU holds one rank; leave it out")
    options |= {name: tuple(options[name]) for name in ("hidden", "precision")}
    start(options["threads"])
    for name in chosen:
        SECTIONS[name](Sizes(**options, device="cuda" if gpu else "cpu"))


if __name__ == "__main__":
    main()
