"""Compiles every Triton kernel to machine code for an H100, which takes no GPU, and prints one line for each.

To be run as a program, without TRITON_INTERPRET: the interpreter takes what the compiler would refuse. The
launchers of `triton_streaming` run as they are, with tensors on the CPU, up to the launch.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from megatron_opd.kernels import triton_kernels, triton_streaming
from tests.kernels import formulas

H100 = SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
)


def compile_only(kernel: Any) -> None:
    """From now on a launch of this kernel compiles it and prints its name and the size of its machine code."""
    run = functools.partial(kernel.run, warmup=True)

    def compile_and_print(*args: Any, warmup: bool, **options: Any) -> None:
        compiled = run(*args, **options)
        print(kernel.fn.__name__, options, len(compiled.asm["cubin"]), "bytes")

    kernel.run = compile_and_print


def main() -> None:
    triton.runtime.driver.set_active(H100)
    for name in ("statistics_kernel", "jsd_statistics_kernel", "gradient_kernel"):
        compile_only(getattr(triton_kernels, name))
    triton_streaming.FEW_TOKENS = 0  # the tiles of long batches, for three tokens
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        student, teacher = torch.zeros(2, 3, 5000, dtype=dtype)
        rows = formulas.random_rows(3, student)
        for flag in (False, True):
            triton_streaming.statistics(student, None, temperature=1.0, entropies=flag)
            triton_streaming.statistics(student, teacher, temperature=0.7, forward_cross=flag, entropies=flag)
        assert rows.teacher_max is not None and rows.log_sum_ratio is not None
        triton_streaming.jsd_statistics(
            student,
            teacher,
            student_max_N=rows.student_max,
            teacher_max_N=rows.teacher_max,
            log_sum_ratio_N=rows.log_sum_ratio,
            beta=0.3,
            temperature=0.7,
        )
        for kind in ("reverse_kl", "jsd", "forward_kl"):
            triton_streaming.gradient(
                student, teacher, kind=kind, rows=rows, temperature=0.7, beta=0.3, out_NV=student
            )
        rows = rows._replace(divergence_scale=None)
        triton_streaming.gradient(student, None, kind="logprob", rows=rows, temperature=1.0, out_NV=student)


if __name__ == "__main__":
    main()
