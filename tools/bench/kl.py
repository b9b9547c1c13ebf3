"""Time and memory of our reverse KL against plain autograd over torch's log_softmax, side by side in one run.

    python -m tools.bench.kl [--tokens 512] [--vocab 49152] [--threads 2] [--repeats 7]

Both get the same float32 or bfloat16 logits and produce the loss of each token and the gradient of the
student's logits. The plain version computes in float32. Times are medians of alternating runs; extra memory
is the highest resident size during the call over the one before it, so on a CPU it counts the returned
gradient. Runs on the GPU where there is one, and then takes the memory from torch's allocator.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import threading
import time
from collections.abc import Callable

import psutil
import torch
from torch import Tensor

from megatron_opd.objectives import reference, vocab_parallel_divergence


def plain(student: Tensor, teacher: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    student_logprob = torch.log_softmax(student, -1, dtype=torch.float32)
    teacher_logprob = torch.log_softmax(teacher, -1, dtype=torch.float32)
    divergence = (student_logprob.exp() * (student_logprob - teacher_logprob)).sum(-1)
    (gradient,) = torch.autograd.grad((divergence * upstream).sum(), student)
    return divergence.detach(), gradient


def ours(student: Tensor, teacher: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    divergence = vocab_parallel_divergence(student, teacher).divergence
    (gradient,) = torch.autograd.grad((divergence * upstream).sum(), student)
    return divergence.detach(), gradient


def ours_inplace(student: Tensor, teacher: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    divergence = vocab_parallel_divergence(student, teacher, inplace_backward=True).divergence
    (gradient,) = torch.autograd.grad((divergence * upstream).sum(), student)
    return divergence.detach(), gradient


def measure(call: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds and extra MiB of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        kept = call()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        del kept
        return seconds, (torch.cuda.max_memory_allocated() - before) / 2**20
    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    kept = call()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    del kept
    return seconds, (peak - before) / 2**20


def compare(tokens: int, vocab: int, dtype: torch.dtype, repeats: int, device: str) -> None:
    torch.manual_seed(0)
    student = (3.0 * torch.randn(tokens, vocab, device=device)).to(dtype)
    teacher = (student.float() + torch.randn(tokens, vocab, device=device)).to(dtype)
    upstream = torch.rand(tokens, device=device)
    truth = reference.vocab_parallel_divergence(student[:8].cpu(), teacher[:8].cpu()).divergence
    calls = {"plain log_softmax": plain, "ours": ours, "ours, gradient in place": ours_inplace}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    errors = {}
    for repeat in range(repeats + 1):  # the first round only warms up
        for name, function in calls.items():
            sample = measure(functools.partial(function, student.clone(), teacher, upstream), device)
            if repeat > 0:
                samples[name].append(sample)
                continue
            value = function(student.clone(), teacher, upstream)[0]
            errors[name] = (value[:8].cpu().double() - truth).abs().max().item()
    base = statistics.median(seconds for seconds, _ in samples["plain log_softmax"])
    logits_mib = student.numel() * student.element_size() / 2**20
    print(
        f"\n{tokens} tokens, vocabulary {vocab}, {dtype}, {device}; one logits tensor: {logits_mib:.0f} MiB"
    )
    print(f"{'':26}{'ms':>8}{'of plain':>10}{'extra MiB':>11}{'KL error':>10}")
    for name, taken in samples.items():
        seconds = statistics.median(seconds for seconds, _ in taken)
        extra = max(extra for _, extra in taken)
        print(f"{name:26}{1e3 * seconds:8.1f}{seconds / base:10.2f}{extra:11.0f}{errors[name]:10.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float32, torch.bfloat16):
        compare(arguments.tokens, arguments.vocab, dtype, arguments.repeats, device)


if __name__ == "__main__":
    main()
