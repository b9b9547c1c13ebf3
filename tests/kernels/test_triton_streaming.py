"""What only the Triton kernels have: tiles and launches of several sizes, and a compiler that must accept them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton

from megatron_opd.kernels import triton_streaming

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_interpreter_runs_where_there_is_no_gpu() -> None:
    assert triton.knobs.runtime.interpret == (DEVICE == "cpu")


@pytest.mark.parametrize("few_tokens", [0, 100])
def test_tiles_change_nothing(few_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_streaming, "FEW_TOKENS", few_tokens)
    torch.manual_seed(0)
    student, teacher = 8 * torch.randn(2, 3, 50, dtype=torch.float64, device=DEVICE)
    results = []
    for tile_bytes in (
        16,
        128,
        512,
        2**20,
    ):  # tiles of 2 columns, of 16, of one more than there are, and as many
        monkeypatch.setattr(triton_streaming, "TILE_BYTES", tile_bytes)
        with np.errstate(over="ignore", invalid="ignore"):
            packed = triton_streaming.statistics(
                student, teacher, temperature=0.7, forward_cross=True, entropies=True
            )
        results.append(packed)
    for packed in results[1:]:
        torch.testing.assert_close(packed, results[0], rtol=1e-13, atol=1e-12)


def test_columns_must_be_adjacent() -> None:
    student = torch.zeros(4, 6, device=DEVICE).t()
    with pytest.raises(AssertionError):
        triton_streaming.statistics(student, None, temperature=1.0)


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for_gpu"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 * 9 and all(line.endswith("bytes") for line in lines)
