"""A tiny student and teacher trained on recorded rollouts, in any layout: what several tests share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opd.checkpoint.hf_export import export_hf_tensors
from megatron_opd.checkpoint.weights import load_model_weights
from megatron_opd.config.schema import OptimizerConfig
from megatron_opd.data.packing import Microbatch, pack
from megatron_opd.data.rollouts import Rollout
from megatron_opd.models.architecture import Architecture, read_architecture
from megatron_opd.models.gpt import GPT, build_gpt
from megatron_opd.objectives import Objective, TokenWeight
from megatron_opd.parallel import cpu
from megatron_opd.parallel.groups import ParallelLayout, build_groups
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.teacher.teacher import Asked
from megatron_opd.training.student import Student, build_student
from megatron_opd.training.update import Measured, ObjectivePass, Update, UpdateScale
from tests.tiny import VOCAB, recorded_rollouts, save_tiny_model

SCHEDULED = OptimizerConfig(lr=1e-3, warmup_steps=2, schedule="cosine", weight_decay=0.1)
TOTAL_STEPS = 5
IW_OPD = Objective(token_weight=TokenWeight(kind="cumulative_share"))


def save_pair(folder: Path) -> None:
    """Cross-scale pairs: the teacher has another width and depth, and its embeddings are not tied."""
    for tied in (True, False):
        save_tiny_model(folder / f"student-{tied}", seed=1, tied=tied)
    save_tiny_model(folder / "student-qwen2", seed=3, family="qwen2")
    save_tiny_model(folder / "teacher", seed=2, layers=8, hidden=96, tied=False)


@dataclass
class TinyRun:
    """Student, objective and groups of this rank."""

    layout: ParallelLayout
    groups: ProcessGroupCollection
    arch: Architecture
    student: Student
    objective: ObjectivePass

    def forward_backward(self, step: int, rollouts: int = 9) -> dict[str, float]:
        """Accumulate the gradients of recorded step `step`."""
        return self.accumulate(self.pack(recorded_rollouts(rollouts, seed=step)))

    def pack(self, rollouts: Sequence[Rollout]) -> list[list[Microbatch]]:
        """The whole microbatches of every data-parallel rank."""
        return pack(
            rollouts,
            dp_size=self.layout.data,
            token_budget=96,
            alignment=self.layout.segment_alignment,
            count_multiple=self.layout.microbatch_multiple,
        )

    def accumulate(self, packed: list[list[Microbatch]]) -> dict[str, float]:
        """Accumulate the gradients of these microbatches, a list for each data-parallel rank."""
        return self.measure(packed).sums

    def measure(self, packed: list[list[Microbatch]], lengths: Sequence[int] = ()) -> Measured:
        """The same, and what it measures by position and, of the first rollouts, of these lengths, by token."""
        cp = self.groups.cp
        microbatches = [each.shard(cp.rank(), cp.size()) for each in packed[self.groups.dp.rank()]]
        scale = UpdateScale.of(packed)
        self.student.zero_grad()
        scored = self.objective.teacher.score(Asked(microbatches, packed))
        update = Update(microbatches, scale, scored, lengths=lengths)
        return self.objective.run(self.student.ddps, update)

    def train(self, steps: range) -> list[dict[str, float]]:
        """Train on recorded steps; statistics, gradient norm and learning rate of each."""
        curve = []
        for step in steps:
            self.student.start_step()
            sums = self.forward_backward(step)
            norm, applied = self.student.apply_gradients()
            assert applied
            curve.append({**sums, "grad_norm": norm, "lr": self.student.learning_rate})
        return curve

    def gradients(self) -> dict[str, torch.Tensor]:
        """The main gradients under their Hugging Face names, in the parameters' dtype, assembled from all shards.

        The distributed optimizer leaves each data-parallel rank the sum of its own part of every bucket only: here the
        ranks give each other their parts.
        """
        for ddp in self.student.ddps:
            for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers):
                group = buffer.data_parallel_group
                for bucket in buffer.buckets if ddp.ddp_config.use_distributed_optimizer else ():
                    mine = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)
        parameters = [parameter for chunk in self.student.chunks for parameter in chunk.parameters()]
        values = [parameter.data for parameter in parameters]
        try:
            for parameter in parameters:
                # Another dtype would cost the parameter the hook that accumulates its gradient.
                parameter.data = parameter.main_grad.to(parameter.dtype, copy=True)
            return self.parameters()
        finally:
            for parameter, value in zip(parameters, values, strict=True):
                parameter.data = value

    def parameters(self) -> dict[str, torch.Tensor]:
        """The parameters under their Hugging Face names, assembled from all shards."""
        exported = export_hf_tensors(self.student.chunks, self.arch, self.groups)
        return {name: tensor.clone() for name, tensor in exported}


def build_run(
    layout: ParallelLayout,
    folder: Path,
    *,
    tied: bool = True,
    student_name: str | None = None,
    optimizer: OptimizerConfig = SCHEDULED,
    precision: str = "fp32",
    recompute: str = "none",
    objective: Objective = IW_OPD,
    head_chunk: int | None = None,
) -> TinyRun:
    """Build what `save_pair(folder)` saved, in this layout."""
    cpu.install()
    torch.set_num_threads(1)
    groups = build_groups(layout)
    folders = (folder / (student_name or f"student-{tied}"), folder / "teacher")
    archs = [read_architecture(path) for path in folders]
    padded = max(arch.padded_vocab_size(layout.tensor) for arch in archs)

    def load(arch: Architecture, path: Path, recompute: str) -> list[GPT]:
        chunks = build_gpt(
            arch, layout, groups, precision=precision, padded_vocab_size=padded, recompute=recompute
        )
        load_model_weights(chunks, arch, path, groups=groups, padded_vocab_size=padded)
        return chunks

    student = build_student(
        load(archs[0], folders[0], recompute), optimizer, groups, precision=precision, steps=TOTAL_STEPS
    )
    teacher = MegatronTeacher(load(archs[1], folders[1], "none"), groups)
    run = ObjectivePass(student.chunks[-1], teacher, objective, VOCAB, groups, head_chunk=head_chunk)
    return TinyRun(layout, groups, archs[0], student, run)


def assert_close(curve: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float) -> None:
    """Every number of every step agrees within the tolerance, relative or absolute."""
    for got, want in zip(curve, expected, strict=True):
        for name in want:
            assert got[name] == pytest.approx(want[name], rel=tolerance, abs=tolerance), name
