"""What both implementations of the streaming passes must give: the dense formulas, on every kind of input.

Without a GPU the Triton kernels run in Triton's interpreter (see tests/__init__.py), in tiles of a few columns.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_opd import kernels
from megatron_opd.kernels import GradientRows, statistic_names, torch_streaming, triton_streaming
from tests.kernels import formulas

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("reverse_kl", "jsd", "forward_kl", "logprob")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
OPTIONS = {"temperature": 0.7, "forward_cross": True, "entropies": True}
COUNT, WIDTH = 5, 37  # not a multiple of any tile
INF = float("inf")


@pytest.fixture(params=[torch_streaming, triton_streaming], ids=["torch", "triton"])
def streaming(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    """Tiles of 16 columns (8 in float64); NumPy, which the interpreter computes in, need not warn of infinities."""
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(triton_streaming, "TILE_BYTES", 64)
        patch.setattr(triton_streaming, "FEW_TOKENS", 0)
        yield


def random_logits(
    dtype: torch.dtype, count: int = COUNT, width: int = WIDTH, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = 4 * torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    student, teacher = both.to(DEVICE, dtype)
    return student, teacher


def tolerance(dtype: torch.dtype) -> dict[str, Any]:
    """Of numbers that an implementation keeps in float64 or float32."""
    return {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}


def rounding(streaming: ModuleType, dtype: torch.dtype) -> dict[str, Any]:
    """Of numbers that it has stored in the logits' dtype. The interpreter cuts off digits where a GPU rounds."""
    if dtype != torch.bfloat16:
        return tolerance(dtype)
    cut_off = streaming is triton_streaming and DEVICE == "cpu"
    return {"rtol": 2**-7 if cut_off else 2**-8, "atol": 2e-5}


def named(packed: Tensor, **flags: bool) -> dict[str, Tensor]:
    return {name: row.double() for name, row in zip(statistic_names(**flags), packed, strict=True)}


def gradient(
    streaming: ModuleType,
    kind: str,
    student: Tensor,
    teacher: Tensor | None,
    rows: GradientRows,
    out: Tensor,
    temperature: float = 0.7,
) -> Tensor:
    streaming.gradient(student, teacher, kind=kind, rows=rows, temperature=temperature, beta=0.3, out_NV=out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_statistics(streaming: ModuleType, dtype: torch.dtype, temperature: float) -> None:
    student, teacher = random_logits(dtype)
    packed = streaming.statistics(
        student, teacher, temperature=temperature, forward_cross=True, entropies=True
    )
    assert packed.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = formulas.statistics(student, teacher, temperature)
    torch.testing.assert_close(
        named(packed, forward_cross=True, entropies=True), expected, **tolerance(dtype)
    )


@pytest.mark.parametrize(("teacher", "forward_cross"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("entropies", [False, True])
def test_rows_asked_for(streaming: ModuleType, teacher: bool, forward_cross: bool, entropies: bool) -> None:
    student_NV, teacher_NV = random_logits(torch.float64)
    flags = {"forward_cross": forward_cross, "entropies": entropies}
    packed = streaming.statistics(student_NV, teacher_NV if teacher else None, temperature=0.7, **flags)
    expected = formulas.statistics(student_NV, teacher_NV, 0.7)
    expected = {name: expected[name] for name in statistic_names(teacher=teacher, **flags)}
    torch.testing.assert_close(named(packed, teacher=teacher, **flags), expected, **tolerance(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_statistics(streaming: ModuleType, dtype: torch.dtype, temperature: float, beta: float) -> None:
    student, teacher = random_logits(dtype)
    rows = formulas.random_rows(COUNT, student)
    packed = jsd(streaming, student, teacher, rows, beta, temperature)
    expected = formulas.jsd_statistics(student, teacher, rows, beta, temperature)
    torch.testing.assert_close(packed.double(), expected, **tolerance(dtype))


def jsd(
    streaming: ModuleType,
    student: Tensor,
    teacher: Tensor,
    rows: GradientRows,
    beta: float,
    temperature: float,
) -> Tensor:
    return streaming.jsd_statistics(
        student,
        teacher,
        student_max_N=rows.student_max,
        teacher_max_N=rows.teacher_max,
        log_sum_ratio_N=rows.log_sum_ratio,
        beta=beta,
        temperature=temperature,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("logprob", [True, False])
def test_gradient(streaming: ModuleType, kind: str, dtype: torch.dtype, logprob: bool) -> None:
    student, teacher = random_logits(dtype)
    rows = formulas.random_rows(COUNT, student)
    rows = rows if logprob else rows._replace(logprob_scale=None)
    out = gradient(streaming, kind, student, teacher, rows, torch.full_like(student, torch.nan))
    expected = formulas.gradient(kind, student, teacher, rows, 0.3, 0.7)
    torch.testing.assert_close(out.double(), expected, **rounding(streaming, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_over_its_own_input(streaming: ModuleType, kind: str, dtype: torch.dtype) -> None:
    student, teacher = random_logits(dtype)
    rows = formulas.random_rows(COUNT, student)
    aside = gradient(streaming, kind, student, teacher, rows, torch.empty_like(student))
    assert torch.equal(gradient(streaming, kind, student, teacher, rows, student), aside)


def test_logprob_gradient_without_a_teacher(streaming: ModuleType) -> None:
    student, _ = random_logits(torch.float64)
    rows = GradientRows(student.amax(-1), logprob_scale=student[:, 0].contiguous())
    out = gradient(streaming, "logprob", student, None, rows, torch.empty_like(student))
    torch.testing.assert_close(out, formulas.gradient("logprob", student, None, rows, 0.3, 0.7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_a_wider_tensor(streaming: ModuleType, dtype: torch.dtype) -> None:
    """Shards are views of padded logits: nothing beyond their columns is read into a sum or written."""
    student, teacher = random_logits(dtype)
    wide, wide_teacher = (
        torch.cat([logits, logits.new_full((COUNT, 9), 50.0)], 1) for logits in (student, teacher)
    )
    views = wide[:, :WIDTH], wide_teacher[:, :WIDTH]
    rows = formulas.random_rows(COUNT, student)
    assert torch.equal(
        streaming.statistics(*views, **OPTIONS), streaming.statistics(student, teacher, **OPTIONS)
    )
    assert torch.equal(
        jsd(streaming, *views, rows, 0.3, 0.7), jsd(streaming, student, teacher, rows, 0.3, 0.7)
    )
    for kind in KINDS:
        expected = gradient(streaming, kind, student, teacher, rows, torch.empty_like(student))
        out = wide.clone()
        gradient(streaming, kind, *views, rows, out[:, :WIDTH])
        assert torch.equal(out[:, :WIDTH], expected) and (out[:, WIDTH:] == 50).all()


def test_different_dtypes(streaming: ModuleType) -> None:
    student, teacher = random_logits(torch.bfloat16)[0], random_logits(torch.float32)[1]
    expected = formulas.statistics(student, teacher, 0.7)
    packed = streaming.statistics(student, teacher, **OPTIONS)
    torch.testing.assert_close(
        named(packed, forward_cross=True, entropies=True), expected, **tolerance(torch.float32)
    )
    assert streaming.statistics(student, teacher.double(), **OPTIONS).dtype == torch.float64


def impossible_ids(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Ids that one model, the other or both give probability 0: in the first tiles, in the last, everywhere."""
    student, teacher = random_logits(dtype)
    student[0, :20], teacher[0, :20] = -INF, -INF
    student[1, :20] = -INF
    teacher[2, 20:] = -INF
    student[3], teacher[3] = -INF, -INF
    student[4, 30], student[4, :30] = 3000.0, -INF  # everything before it becomes impossible once it is met
    return student, teacher


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_impossible_ids(streaming: ModuleType, dtype: torch.dtype) -> None:
    student, teacher = impossible_ids(dtype)
    expected = formulas.statistics(student, teacher, 0.7)
    packed = streaming.statistics(student, teacher, **OPTIONS)
    assert not packed.isnan().any()
    assert (packed[:, 3] == packed.new_tensor([torch.finfo(packed.dtype).min, 0] * 2 + [0] * 4)).all()
    torch.testing.assert_close(
        named(packed, forward_cross=True, entropies=True), expected, **tolerance(dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_late_maximum_silences_what_came_before(streaming: ModuleType, dtype: torch.dtype) -> None:
    """A gap of +inf, or one to a far teacher, counts for nothing once the student's probability there is 0."""
    student, teacher = random_logits(dtype)
    student[:, -1] = 5000.0
    teacher[:, :20], teacher[0] = -INF, -INF
    expected = formulas.statistics(student, teacher, 1.0)
    packed = named(streaming.statistics(student, teacher, temperature=1.0))
    assert expected["reverse_cross"][1:].isfinite().all() and expected["reverse_cross"][0] == INF
    torch.testing.assert_close(packed["reverse_cross"], expected["reverse_cross"], **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_at_impossible_ids(streaming: ModuleType, kind: str, dtype: torch.dtype) -> None:
    student, teacher = impossible_ids(dtype)
    student[2, 20:] = -INF  # else the reverse KL is infinite
    rows = formulas.random_rows(COUNT, student)
    rows = rows._replace(student_max=formulas.shifted(student, 0.5)[1].to(rows.student_max.dtype))
    out = gradient(streaming, kind, student, teacher, rows, torch.empty_like(student), 0.5)
    expected = formulas.gradient(kind, student, teacher, rows, 0.3, 0.5)
    torch.testing.assert_close(out.double(), expected, **rounding(streaming, dtype))
    assert kind == "forward_kl" or (out[student == -INF] == 0).all()


@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_jsd_where_one_model_has_no_mass(streaming: ModuleType, beta: float) -> None:
    """The mixture is then the other model's share, and ratios of any size do not overflow."""
    student, teacher = impossible_ids(torch.float32)
    student[4, 30] = 30.0
    student[0, 36], teacher[0, 35] = 300.0, 400.0
    rows = formulas.random_rows(COUNT, student)
    a, student_max = formulas.shifted(student, 1.0)
    b, teacher_max = formulas.shifted(teacher, 1.0)
    ratio = a.exp().sum(-1).log() - b.exp().sum(-1).log()
    rows = rows._replace(
        student_max=student_max.float(),
        teacher_max=teacher_max.float(),
        log_sum_ratio=ratio.nan_to_num().float(),
    )
    packed = jsd(streaming, student, teacher, rows, beta, 1.0)
    assert packed.isfinite().all()
    expected = formulas.jsd_statistics(student, teacher, rows, beta, 1.0)
    torch.testing.assert_close(packed.double(), expected, **tolerance(torch.float32))


@pytest.mark.parametrize("bad", [torch.nan, INF])
@pytest.mark.parametrize("column", [0, 20, WIDTH - 1])
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_bad_logits_show_in_their_own_models_sum(
    streaming: ModuleType, model: str, column: int, bad: float
) -> None:
    student, teacher = random_logits(torch.float32)
    (student if model == "student" else teacher)[2, column] = bad
    rows = named(streaming.statistics(student, teacher, **OPTIONS), forward_cross=True, entropies=True)
    for name in ("student", "teacher"):
        expected = torch.arange(COUNT, device=DEVICE) == (2 if name == model else -1)
        assert torch.equal(rows[f"{name}_sum"].isnan(), expected)
    others = torch.arange(COUNT) != 2
    expected_rows = formulas.statistics(student, teacher, 0.7)
    for name, row in rows.items():
        torch.testing.assert_close(row[others], expected_rows[name][others], **tolerance(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, WIDTH), (3, 0), (0, 0)])
def test_no_tokens_or_no_columns(streaming: ModuleType, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    student, teacher = random_logits(dtype, *shape)
    packed = streaming.statistics(student, teacher, **OPTIONS)
    rows = formulas.random_rows(shape[0], student)
    lowest = torch.finfo(packed.dtype).min
    assert packed.shape == (8, shape[0])
    assert all(
        (row == (lowest if "max" in name else 0)).all()
        for name, row in named(packed, forward_cross=True, entropies=True).items()
    )
    assert torch.equal(jsd(streaming, student, teacher, rows, 0.3, 0.7), packed.new_zeros(2, shape[0]))
    for kind in KINDS:
        assert gradient(streaming, kind, student, teacher, rows, student).shape == shape


@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(1, 4),
    width=st.integers(1, 70),
    seed=st.integers(0, 2**16),
    temperature=st.sampled_from([1.0, 0.3, 2.5]),
    beta=st.floats(0.01, 0.99),
    kind=st.sampled_from(KINDS),
)
def test_both_agree_on_random_shapes(
    count: int, width: int, seed: int, temperature: float, beta: float, kind: str
) -> None:
    student, teacher = random_logits(torch.float64, count, width, seed)
    rows = formulas.random_rows(count, student)
    results = []
    for streaming in (torch_streaming, triton_streaming):
        out = torch.empty_like(student)
        streaming.gradient(
            student, teacher, kind=kind, rows=rows, temperature=temperature, beta=beta, out_NV=out
        )
        packed = streaming.statistics(
            student, teacher, temperature=temperature, forward_cross=True, entropies=True
        )
        results.append((packed, jsd(streaming, student, teacher, rows, beta, temperature), out))
    torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["statistics", "jsd_statistics", "gradient"])
def test_the_device_chooses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (torch_streaming, triton_streaming):
        monkeypatch.setattr(module, name, lambda logits, *, kind, where=module: (where, logits, kind))
    for device, module in (("cpu", torch_streaming), ("cuda", triton_streaming)):
        logits = SimpleNamespace(device=torch.device(device))
        assert getattr(kernels, name)(logits, kind="jsd") == (module, logits, "jsd")


def test_torch_where_triton_is_not_installed() -> None:
    code = """
import sys
sys.modules["triton"] = None  # importing it fails from here on, and find_spec knows nothing of it
from megatron_opd import kernels
print(kernels._implementation("cuda").__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["megatron_opd.kernels.torch_streaming"]
