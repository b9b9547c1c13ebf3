"""Memory bandwidth of the Triton passes over logits on a GPU, as a share of a copy's in the same run.

    python -m tools.bench.gpu_kernels [--tokens 8192] [--vocab 151936]

The logits are bfloat16. Bytes are those that a pass cannot avoid: every logit read once, every gradient written
once; the copy counts its bytes read and written. Times are medians, by device events. The error is the largest
difference from `torch_streaming` on the first tokens over the largest number there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
import triton
from torch import Tensor

from megatron_opd.kernels import GradientRows, statistic_names, torch_streaming, triton_streaming

CHECKED_TOKENS = 64


def rows_of(student: Tensor, teacher: Tensor) -> GradientRows:
    """What a backward pass would give `gradient` for incoming gradients of 1."""
    packed = triton_streaming.statistics(student, teacher, temperature=1.0)
    row = dict(zip(statistic_names(), packed, strict=True))
    scale = 1 / row["student_sum"]
    return GradientRows(
        row["student_max"],
        divergence_scale=scale,
        logprob_scale=0.5 * scale,
        teacher_max=row["teacher_max"],
        center=row["reverse_cross"] * scale,
        teacher_scale=1 / row["teacher_sum"],
        log_sum_ratio=row["student_sum"].log() - row["teacher_sum"].log(),
    )


def passes(student: Tensor, teacher: Tensor, out: Tensor) -> dict[str, tuple[int, Callable[..., Tensor]]]:
    """Name -> how many logits tensors it must move, and a function of (implementation, tokens)."""
    rows = rows_of(student, teacher)
    assert rows.teacher_max is not None and rows.log_sum_ratio is not None
    maxima = {"student_max_N": rows.student_max, "teacher_max_N": rows.teacher_max}
    maxima["log_sum_ratio_N"] = rows.log_sum_ratio

    def statistics(where: ModuleType, tokens: slice, **flags: bool) -> Tensor:
        return where.statistics(student[tokens], teacher[tokens], temperature=1.0, **flags)

    def jsd(where: ModuleType, tokens: slice) -> Tensor:
        numbers = {name: row[tokens] for name, row in maxima.items()}
        return where.jsd_statistics(student[tokens], teacher[tokens], beta=0.5, temperature=1.0, **numbers)

    def gradient(where: ModuleType, tokens: slice, kind: str) -> Tensor:
        where.gradient(
            student[tokens],
            None if kind == "logprob" else teacher[tokens],
            kind=kind,
            rows=rows.at(tokens),
            temperature=1.0,
            beta=0.5,
            out_NV=out[tokens],
        )
        return out[tokens]

    named: dict[str, tuple[int, Callable[..., Tensor]]] = {
        "statistics": (2, statistics),
        "statistics, all sums": (2, partial(statistics, forward_cross=True, entropies=True)),
        "statistics, JSD": (2, jsd),
    }
    for kind, tensors in (("reverse_kl", 3), ("forward_kl", 3), ("jsd", 3), ("logprob", 2)):
        named[f"gradient, {kind}"] = (tensors, partial(gradient, kind=kind))
    return named


def milliseconds(call: Callable[[], object]) -> float:
    return triton.testing.do_bench(call, warmup=100, rep=500, return_mode="median")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=151936)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is no GPU here: nothing measured. tools.bench.objectives measures a CPU.")
    torch.manual_seed(0)
    student = torch.empty(arguments.tokens, arguments.vocab, device="cuda", dtype=torch.bfloat16).normal_(
        std=3
    )
    teacher = student + torch.randn_like(student)
    out = torch.empty_like(student)
    size = student.numel() * student.element_size()
    copy = 2 * size / milliseconds(lambda: out.copy_(student)) / 1e9
    print(
        f"{torch.cuda.get_device_name()}, {arguments.tokens} tokens, vocabulary {arguments.vocab}, bfloat16"
    )
    print(f"copy: {copy:.2f} TB/s\n\n{'':26}{'ms':>8}{'TB/s':>8}{'of copy':>9}{'error':>10}")
    first, everything = slice(CHECKED_TOKENS), slice(None)
    for name, (tensors, function) in passes(student, teacher, out).items():
        time = milliseconds(partial(function, triton_streaming, everything))
        speed = tensors * size / time / 1e9
        got, wanted = (function(where, first).double() for where in (triton_streaming, torch_streaming))
        error = (got - wanted).abs().max() / wanted.abs().max()
        print(f"{name:26}{time:8.2f}{speed:8.2f}{speed / copy:9.2f}{error.item():10.1e}")


if __name__ == "__main__":
    main()
