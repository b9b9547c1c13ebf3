"""What a layout computes from recorded rollouts, in terms that every layout shares: what the parity matrix compares.

A row is observed on its processes by `observe`; `differences` compares that with what one process observed.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opd.config.schema import OptimizerConfig
from megatron_opd.data.packing import Microbatch
from megatron_opd.data.rollouts import Rollout
from megatron_opd.objectives import Objective, TokenStats, TokenWeight, zigzag_positions
from megatron_opd.parallel.groups import ParallelLayout
from tests.checkpoint.models import write_hf
from tests.tiny import VOCAB, recorded_rollouts
from tests.training.tiny_run import TinyRun, build_run, save_pair

STEPS = 3
ROLLOUTS = 9
STATISTICS = ("student log-prob", "teacher log-prob", "reverse KL", "weight in the loss")
MODELS = {
    "tied": ("dense", "student-True"),
    "untied": ("dense", "student-False"),
    "biases": ("dense", "student-qwen2"),  # of queries, keys and values
    "moe": ("moe", "student"),
}
SGD = OptimizerConfig(name="sgd", lr=0.5)


@dataclass(frozen=True)
class Row:
    """A model in a layout. `full` rows run with `make test-full` only."""

    model: str
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    precision: str = "fp32"
    recompute: str = "none"
    head_chunk: int | None = None
    full: bool = False

    def __str__(self) -> str:
        parts = [self.model, str(self.layout), self.precision]
        parts += [] if self.recompute == "none" else [f"{self.recompute} recompute"]
        return "-".join(parts + ([] if self.head_chunk is None else [f"head in chunks of {self.head_chunk}"]))


@dataclass
class Observed:
    """What one rank saw of a row."""

    tokens: dict[
        tuple[str, int], Tensor
    ]  # (prompt id, place in the response) -> `STATISTICS`; last stage only
    gradients: dict[str, Tensor]  # main gradients of the first step, by Hugging Face name
    curve: list[
        dict[str, float]
    ]  # sums of the loss and of statistics, gradient norm, learning rate of each step
    moved: dict[str, Tensor]  # how far every parameter went, by Hugging Face name
    main_dtypes: set[torch.dtype]  # of what the optimizer updates, and of the gradients it reads


@dataclass(frozen=True)
class RecordingObjective(Objective):
    """Keeps the statistics of every token, among them the factor of its divergence in the loss."""

    records: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # a microbatch: positions [N], [N, 4]

    def loss(
        self, stats: TokenStats, positions_N: Tensor, mask_T: Tensor, cu_seqlens: Tensor, **known: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, sums = super().loss(stats, positions_N, mask_T, cu_seqlens, **known)
        (weight_N,) = torch.autograd.grad(loss, stats.divergence, retain_graph=True)
        columns = (stats.student_logprob, stats.teacher_logprob, stats.reverse_kl, weight_N)
        values_N4 = torch.stack([column.detach().float() for column in columns if column is not None], dim=1)
        self.records.append((positions_N, values_N4))
        return loss, sums


def save_models(folder: Path) -> None:
    """Dense students with a dense teacher of another size, and a student with experts with a teacher that has some."""
    save_pair(folder / "dense")
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 128}
    write_hf(folder / "moe" / "student", "qwen3_moe", tied=True, **sizes)
    write_hf(folder / "moe" / "teacher", "qwen3_moe", tied=False, norm_topk_prob=False, **sizes)


def observe(row: Row, models: Path, optimizer: OptimizerConfig = SGD) -> Observed:
    """Train on the recorded rollouts; every rank of the row's layout calls it.

    With SGD, for Adam would hide a wrong scale of a gradient and turn one that is almost zero into a whole step.
    """
    folder, student = MODELS[row.model]
    recording = RecordingObjective(token_weight=TokenWeight(kind="cumulative_share"))
    run = build_run(
        row.layout,
        models / folder,
        student_name=student,
        optimizer=optimizer,
        precision=row.precision,
        recompute=row.recompute,
        head_chunk=row.head_chunk,
        objective=recording,
    )
    before = run.parameters()
    rollouts = recorded_rollouts(ROLLOUTS)
    packed = run.pack(rollouts)
    run.student.start_step()
    sums = run.accumulate(packed)
    tokens = by_token(run, packed[run.groups.dp.rank()], rollouts, recording.records)
    gradients = run.gradients()
    norm, applied = run.student.apply_gradients()
    assert applied
    curve = [{**sums, "grad_norm": norm, "lr": run.student.learning_rate}, *run.train(range(1, STEPS))]
    dtypes = _main_dtypes(run)
    for parameter in (parameter for chunk in run.student.chunks for parameter in chunk.parameters()):
        parameter.data = getattr(parameter, "main_param", parameter).data  # bf16 rounds most of the way off
    moved = {name: after - before[name].float() for name, after in run.parameters().items()}
    return Observed(tokens, gradients, curve, moved, dtypes)


def _main_dtypes(run: TinyRun) -> set[torch.dtype]:
    mains = {main.dtype for group in run.student.optimizer.param_groups for main in group["params"]}
    return mains | {p.main_grad.dtype for chunk in run.student.chunks for p in chunk.parameters()}


def by_token(
    run: TinyRun, whole: list[Microbatch], rollouts: list[Rollout], records: list[tuple[Tensor, Tensor]]
) -> dict[tuple[str, int], Tensor]:
    """The recorded statistics by token of the rollouts, whatever microbatch and rank it was in."""
    if not records:
        return {}
    by_inputs = {tuple(r.prompt_ids + r.response_ids[:-1]): r for r in rollouts}
    assert len(by_inputs) == len(rollouts), "rollouts that cannot be told apart"
    cp, tokens = run.groups.cp, {}
    for microbatch, (positions_N, values_N4) in zip(whole, records, strict=True):
        if cp.size() > 1:
            positions_N = zigzag_positions(microbatch.cu_seqlens, cp.rank(), cp.size())[positions_N]
        offsets = microbatch.cu_seqlens.tolist()
        segments_N = torch.bucketize(positions_N, microbatch.cu_seqlens[1:].long(), right=True)
        for position, segment, values_4 in zip(
            positions_N.tolist(), segments_N.tolist(), values_N4, strict=True
        ):
            start, end = offsets[segment : segment + 2]
            inputs = tuple(
                token for token in microbatch.tokens_T[start:end].tolist() if token
            )  # 0 is padding
            rollout = by_inputs[inputs]
            tokens[rollout.prompt_id, position - start - len(rollout.prompt_ids) + 1] = values_4.clone()
    return tokens


def differences(rank: Observed, expected: Observed) -> dict[str, tuple[float, str]]:
    """Of each kind of number the largest relative difference from `expected`, and where it is.

    Per token statistics relative to the largest of all tokens, gradients and movements by the norm of each tensor,
    sums over tokens to themselves (of log-gaps with their sign: to the sum without it).
    """
    assert rank.gradients.keys() == expected.gradients.keys() == rank.moved.keys()
    largest_4 = torch.stack(list(expected.tokens.values())).abs().amax(0)
    gaps: dict[str, list[tuple[float, str]]] = {
        "tokens": [(0.0, "")],
        "gradients": [],
        "curve": [],
        "moved": [],
    }
    for place, values_4 in rank.tokens.items():
        gap_4 = (values_4 - expected.tokens[place]).abs() / largest_4
        gaps["tokens"].append((float(gap_4.max()), f"{STATISTICS[int(gap_4.argmax())]} of {place}"))
    for kind, ours, theirs in (
        ("gradients", rank.gradients, expected.gradients),
        ("moved", rank.moved, expected.moved),
    ):
        gaps[kind] += [(float((ours[name] - e).norm() / e.norm()), name) for name, e in theirs.items()]
    for step, (got, want) in enumerate(zip(rank.curve, expected.curve, strict=True), start=1):
        assert got.keys() == want.keys()
        for name, value in want.items():
            scale = want["abs_log_gap"] if name == "log_gap" else abs(value)
            gaps["curve"].append((abs(got[name] - value) / scale, f"{name} of step {step}"))
    return {kind: max(found) for kind, found in gaps.items()}
