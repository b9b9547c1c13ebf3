"""Do two model folders compute the same? Their logits on the same tokens, compared position by position.

A Hugging Face folder is run by plain transformers, a Megatron folder by our GPT on megatron-core, so that a comparison
of the two checks the whole conversion: config, names, layouts, numbers. The models are loaded one after the other, in
one process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_opd.checkpoint.checksums import StateChecksums
from megatron_opd.checkpoint.convert import plan_hf_to_megatron, plan_megatron_to_hf
from megatron_opd.checkpoint.pieces import Plan, dtype_name
from megatron_opd.checkpoint.sample_tokens import SampleTokens, sample_tokens
from megatron_opd.checkpoint.weights import STATE, is_megatron_folder, load_model_weights
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import Architecture
from megatron_opd.models.gpt import DTYPES, build_gpt, packed_forward
from megatron_opd.models.lm_head import logits_shard
from megatron_opd.parallel import cpu
from megatron_opd.parallel.groups import ParallelLayout, build_groups

_ROWS_AT_ONCE = 64  # positions whose probabilities are held in float64 at once


@dataclass(frozen=True)
class Tolerance:
    """What counts as the same: largest difference of two logits, and mean KL divergence in nats per token."""

    logits: float
    kl: float


EXACT = Tolerance(logits=1e-4, kl=1e-6)
"""For weights of one dtype, computed in fp32: what the order of summation makes."""
ROUNDED_WEIGHTS = Tolerance(logits=1.0, kl=1e-3)
"""For weights of different dtypes, computed in fp32. A 135M model and its rounding to bf16: 0.29 and 7e-5."""
ROUNDED = Tolerance(logits=5.0, kl=0.02)
"""For anything computed in bf16. Models of 24 and 30 layers with logits up to 41: up to 2.4 and 0.005."""


@dataclass(frozen=True)
class Comparison:
    """How the logits of B differ from those of A. Divergences are KL(A || B) in nats."""

    max_difference: float
    worst_position: int
    worst_id: int
    mean_kl: float
    max_kl: float
    top1_agreement: float
    """Share of the positions where both put the same token first."""

    def within(self, tolerance: Tolerance) -> bool:
        """Whether the folders count as the same; never with a NaN in the logits."""
        return self.max_difference <= tolerance.logits and self.mean_kl <= tolerance.kl


@dataclass(frozen=True)
class Verification:
    """What was compared, on which tokens, how, and the outcome."""

    folders: tuple[Path, Path]
    sample: SampleTokens
    precision: str
    stored: tuple[str, str]
    comparison: Comparison
    tolerance: Tolerance

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.comparison.within(self.tolerance)

    def describe(self) -> str:
        """The report as text, several lines."""
        sides = [
            f"{letter}  {folder} ({_runner(folder)}, stored in {stored})"
            for letter, folder, stored in zip("AB", self.folders, self.stored, strict=True)
        ]
        found = self.comparison
        where = self.sample.describe_position(found.worst_position)
        return "\n".join(
            [
                *sides,
                f"tokens           {self.sample.describe()}, computed in {self.precision}",
                f"max |A - B|      {found.max_difference:.3g} at position {found.worst_position}{where}, "
                f"logit of id {found.worst_id}",
                f"KL(A || B)       mean {found.mean_kl:.3g}, max {found.max_kl:.3g} nats",
                f"top-1 agreement  {found.top1_agreement:.2%}",
                f"tolerance        max |A - B| {self.tolerance.logits:g}, mean KL {self.tolerance.kl:g}",
            ]
        )


def verify_logits(
    first: Path,
    second: Path,
    *,
    text: Path | None = None,
    tokens: int = 256,
    precision: str = "fp32",
    logits_tolerance: float | None = None,
    kl_tolerance: float | None = None,
) -> Verification:
    """Compare the logits of two model folders of either kind on up to `tokens` tokens of one sequence.

    The tokens are those of `text`, or of built-in conversations. Computed in `precision` ("fp32", "bf16"); in fp32,
    weights stored in bf16 are widened, which is exact. Tolerances that are not given are `default_tolerance`. Held in
    memory: one model, and two arrays of logits in fp32.

    Raises UserError for a broken folder (the files of a Megatron folder are compared with their checksums too), and for
    folders of different vocabularies or tokenizers.
    """
    plans = [checked_plan(folder) for folder in (first, second)]
    archs = [plan.arch for plan in plans]
    _check_vocabularies(plans)
    for folder in filter(is_megatron_folder, (first, second)):
        StateChecksums(folder / STATE).check()
    limit = min(arch.max_positions for arch in archs)
    sample = sample_tokens(first, second, text, count=min(tokens, limit), vocab_size=archs[0].vocab_size)
    logits = [folder_logits(plan.source, plan.arch, sample.ids, precision) for plan in plans]
    stored = [_stored_dtypes(plan) for plan in plans]
    default = default_tolerance(precision, same_dtype=stored[0] == stored[1])
    return Verification(
        folders=(first, second),
        sample=sample,
        precision=precision,
        stored=(stored[0], stored[1]),
        comparison=compare_logits(*logits),
        tolerance=Tolerance(
            default.logits if logits_tolerance is None else logits_tolerance,
            default.kl if kl_tolerance is None else kl_tolerance,
        ),
    )


def default_tolerance(precision: str, *, same_dtype: bool) -> Tolerance:
    """What to allow for logits computed in `precision` from weights of the same dtype, or not."""
    if precision == "bf16":
        return ROUNDED
    return EXACT if same_dtype else ROUNDED_WEIGHTS


def checked_plan(folder: Path) -> Plan:
    """Everything a folder of either kind holds, checked as a conversion of it would. Raises UserError."""
    return plan_megatron_to_hf(folder) if is_megatron_folder(folder) else plan_hf_to_megatron(folder)


@torch.no_grad()
def folder_logits(folder: Path, arch: Architecture, ids: Tensor, precision: str) -> Tensor:
    """The folder's logits [T, V] in fp32, on the CPU, for a sequence of T ids; V without padding."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = _megatron_logits if is_megatron_folder(folder) else _transformers_logits
    return run(folder, arch, ids.to(device), precision)[:, : arch.vocab_size].float().cpu()


def _transformers_logits(folder: Path, arch: Architecture, ids: Tensor, precision: str) -> Tensor:
    del arch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision], local_files_only=True)
    return model.eval().to(ids.device)(ids[None]).logits[0]


def _megatron_logits(folder: Path, arch: Architecture, ids: Tensor, precision: str) -> Tensor:
    padded = arch.padded_vocab_size(1)
    with single_process_groups() as groups:
        (model,) = build_gpt(arch, ParallelLayout(), groups, precision=precision, padded_vocab_size=padded)
        load_model_weights([model], arch, folder, groups=groups, padded_vocab_size=padded)
        model.eval().to(ids.device)
        ends = torch.tensor([0, len(ids)], dtype=torch.int32, device=ids.device)
        hidden = packed_forward(model, ids, torch.arange(len(ids), device=ids.device), ends)
        return logits_shard(hidden[:, 0], model.head_weight, groups.tp)


@contextmanager
def single_process_groups() -> Iterator[ProcessGroupCollection]:
    """Groups of this process alone; megatron-core needs them even so. gloo, without a port."""
    cpu.install()
    joined = dist.is_initialized()
    if not joined:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.get_world_size() == 1, "verification runs in one process"
    try:
        yield build_groups(ParallelLayout())
    finally:
        if not joined:
            dist.destroy_process_group()


def compare_logits(first: Tensor, second: Tensor) -> Comparison:
    """Compare two arrays of logits [T, V] in fp32; the divergences are computed in fp64."""
    differences, ids, divergences = [], [], []
    agreeing = 0
    for a, b in zip(first.split(_ROWS_AT_ONCE), second.split(_ROWS_AT_ONCE), strict=True):
        log_p, log_q = (rows.double().log_softmax(-1) for rows in (a, b))
        furthest = (a - b).abs().max(-1)
        differences.append(furthest.values)
        ids.append(furthest.indices)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0.0))  # a rounding error below 0
        agreeing += int((a.argmax(-1) == b.argmax(-1)).sum())
    largest, kl = torch.cat(differences), torch.cat(divergences)
    worst = int(largest.argmax())  # a NaN counts as the largest
    return Comparison(
        max_difference=float(largest[worst]),
        worst_position=worst,
        worst_id=int(torch.cat(ids)[worst]),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        top1_agreement=agreeing / len(first),
    )


def _check_vocabularies(plans: list[Plan]) -> None:
    (a, b) = plans
    if a.arch.vocab_size != b.arch.vocab_size:
        raise UserError(
            f"{a.source} and {b.source} have different vocabularies: {a.arch.vocab_size} and {b.arch.vocab_size} tokens"
        )


def _stored_dtypes(plan: Plan) -> str:
    """The dtypes of the folder's weights as text."""
    return ", ".join(sorted({dtype_name(dtype) for dtype in plan.dtypes}))


def _runner(folder: Path) -> str:
    return (
        "Megatron, run by megatron-core"
        if is_megatron_folder(folder)
        else "Hugging Face, run by transformers"
    )
