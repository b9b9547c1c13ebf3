"""What `megatron-opd plan` predicts of a rank's memory in training, beside what training really takes there.

Usage: python -m tools.bench.plan_check [--layers N] [--hidden N] [--vocab N] [--length N] [--batch N]

Builds a student and a teacher of random weights in several layouts, on processes of this machine, trains one update
and measures the next: weights, gradients and optimizer state by walking their tensors, the rest by torch's record of
allocations. Prints both of every layout's fullest rank.
"""

import argparse
import json
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_opd.config.schema import Config
from megatron_opd.data.packing import Microbatch, pack
from megatron_opd.data.rollouts import Rollout
from megatron_opd.models.architecture import Architecture
from megatron_opd.models.gpt import GPT, build_gpt
from megatron_opd.parallel import cpu
from megatron_opd.parallel.groups import build_groups
from megatron_opd.plan.memory import StageMemory, stage_memory
from megatron_opd.plan.setting import Setting
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.teacher.payload import tensors_of
from megatron_opd.teacher.teacher import Asked
from megatron_opd.training.student import Student, build_student
from megatron_opd.training.update import ObjectivePass, Update, UpdateScale
from tools.bench.measure import peak_extra

LAYOUTS: dict[str, dict[str, Any]] = {  # overrides of `config_of`
    "DP1": {},
    "DP1, fp32": {"precision": "fp32"},
    "recompute full": {"training.recompute": "full"},
    "head chunk": {"objective.head_chunk": 64},
    "TP2": {"parallel.tensor": 2},
    "TP2 SP": {"parallel.tensor": 2, "parallel.sequence_parallel": True},
    "PP2": {"parallel.pipeline": 2},
    "CP2": {"parallel.context": 2},
    "DP2, distributed optimizer": {"parallel.data": 2},
}


@dataclass(frozen=True)
class Measured:
    """Bytes of a rank."""

    stage: int
    weights: int
    gradients: int
    state: int
    teacher: int
    payload: int
    update: int  # most that an update has alive besides

    @property
    def total(self) -> int:
        """At the peak of an update."""
        return self.weights + self.gradients + self.state + self.teacher + self.payload + self.update


@dataclass(frozen=True)
class Sizes:
    """Of the models, and of the sequences that an update learns from."""

    layers: int = 4
    hidden: int = 256
    vocab: int = 4000
    length: int = 128  # tokens of a prompt and of a response
    batch: int = 8
    experts: int = 0  # of a layer of either model, 2 a token; 0: dense


def save_configs(folder: Path, sizes: Sizes) -> None:
    """The config.json of a student and of a wider teacher: all that the plan reads, and all that is needed here."""
    for name, width in (("student", sizes.hidden), ("teacher", 2 * sizes.hidden)):
        (folder / name).mkdir()
        numbers: dict[str, Any] = {
            "model_type": "qwen3_moe" if sizes.experts else "qwen3",
            "hidden_size": width,
            "intermediate_size": 11 * width // 4,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": width // 32,
            "num_key_value_heads": width // 64,
            "head_dim": 32,
            "vocab_size": sizes.vocab,
            "max_position_embeddings": 4 * sizes.length,
            "tie_word_embeddings": name == "student",
        }
        if sizes.experts:
            numbers |= {"num_experts": sizes.experts, "num_experts_per_tok": 2, "norm_topk_prob": True}
            numbers["moe_intermediate_size"] = width
        (folder / name / "config.json").write_text(json.dumps(numbers))


def config_of(folder: Path, sizes: Sizes, overrides: dict[str, Any]) -> Config:
    """The configuration of a run on the models of `save_configs`; two sequences a microbatch."""
    tree: dict[str, Any] = {
        "run_dir": "none",
        "student": {"path": folder / "student"},
        "teacher": {"path": folder / "teacher"},
        "data": {"prompts": "none", "max_prompt_tokens": sizes.length},
        "rollout": {"prompts_per_step": sizes.batch, "max_new_tokens": sizes.length},
        "training": {"microbatch_tokens": 4 * sizes.length},
    }
    for key, value in overrides.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return Config.model_validate(tree)


@dataclass
class Built:
    """A run on this rank, of random weights and random sequences as long as the configuration allows."""

    setting: Setting
    student: Student
    objective: ObjectivePass
    microbatches: Sequence[Microbatch]  # of this rank; its share of them under context parallelism
    scale: UpdateScale

    @classmethod
    def of(cls, config: Config) -> "Built":
        """Collective over WORLD, which has as many ranks as the layout needs."""
        cpu.install()
        torch.set_num_threads(1)
        setting = Setting.of(config, dist.get_world_size(), "cpu")
        layout = setting.layout
        groups = build_groups(layout)

        def random(arch: Architecture, recompute: str = "none") -> list[GPT]:
            chunks = build_gpt(
                arch,
                layout,
                groups,
                precision=config.precision,
                padded_vocab_size=setting.padded_vocab,
                recompute=recompute,
            )
            for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
                torch.nn.init.normal_(parameter, std=0.02)
            return chunks

        assert setting.teacher is not None
        chunk = config.objective.head_chunk
        teacher = MegatronTeacher(random(setting.teacher), groups, form=setting.payload, head_chunk=chunk)
        student = build_student(
            random(setting.student, config.training.recompute),
            config.optimizer,
            groups,
            precision=config.precision,
            steps=2,
        )
        head = ObjectivePass(
            student.chunks[-1], teacher, setting.objective, setting.vocab, groups, head_chunk=chunk
        )
        packed = pack(
            random_sequences(setting, setting.vocab),
            dp_size=layout.data,
            token_budget=config.training.microbatch_tokens,
            alignment=layout.segment_alignment,
            count_multiple=layout.microbatch_multiple,
        )
        mine = [each.shard(groups.cp.rank(), groups.cp.size()) for each in packed[groups.dp.rank()]]
        return cls(setting, student, head, mine, UpdateScale.of(packed))

    def scored(self) -> Update:
        """The update with its payload."""
        return Update(self.microbatches, self.scale, self.objective.teacher.score(Asked(self.microbatches)))

    def update(self, update: Update) -> None:
        """Forward and backward passes of an update."""
        self.student.zero_grad()
        self.objective.run(self.student.ddps, update)


def random_sequences(setting: Setting, vocab: int) -> list[Rollout]:
    """Those of a step, as long as the configuration allows."""
    work, generator = setting.workload, torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(vocab, (count,), generator=generator).tolist()

    count = work.sequences * setting.layout.data
    logprobs = [-1.0] * work.response
    plain = [
        Rollout(str(i), 0, ids(work.prompt), ids(work.response), logprobs, "length", 0) for i in range(count)
    ]
    if setting.config.teacher.prompt_template is None:
        return plain
    return [replace(each, teacher_prompt_ids=ids(setting.config.teacher_prompt_tokens)) for each in plain]


def measure(config: Config) -> Measured:
    """Bytes of this rank in its second update, whose optimizer state exists. Collective as `Built.of`."""
    built = Built.of(config)
    update = built.scored()
    built.update(update)
    built.student.start_step()
    built.student.apply_gradients()
    return measured(built, update)


def measured(built: Built, update: Update) -> Measured:
    """Bytes of this rank in an update, which it runs, that is not the first. Collective."""
    peak = peak_extra(partial(built.update, update))
    student, teacher = built.student, built.objective.teacher
    assert isinstance(teacher, MegatronTeacher)
    weights = [parameter.data for chunk in student.chunks for parameter in chunk.parameters()]
    buffers = [buffer for ddp in student.ddps for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)]
    payloads = [
        tensor for payload in update.payloads if payload is not None for tensor in tensors_of(payload)
    ]
    return Measured(
        stage=built.objective.groups.pp.rank(),
        weights=held_bytes(weights),
        gradients=held_bytes([buffer.grad_data for buffer in buffers]),
        state=held_bytes(_state(student), without=weights),
        teacher=held_bytes([parameter.data for chunk in teacher.chunks for parameter in chunk.parameters()]),
        payload=held_bytes(payloads),
        update=peak,
    )


def _state(student: Student) -> Iterable[Tensor]:
    """Masters and moments; the steps, a number a parameter, are left out."""
    for part in getattr(student.optimizer, "chained_optimizers", [student.optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter.data
                yield from (
                    value for name, value in part.optimizer.state[parameter].items() if name != "step"
                )


def held_bytes(tensors: Iterable[Tensor], without: Sequence[Tensor] = ()) -> int:
    """Bytes of the storages behind some tensors, each once, but for those behind others."""
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for address, size in storages.items() if address not in known)


def training_parts(memory: StageMemory) -> dict[str, int]:
    """What the plan predicts of training, under the names of `Measured`."""
    training = memory.phases["training"]
    return {
        "weights": memory.always["student weights"],
        "gradients": memory.always["gradients"],
        "state": memory.always["optimizer state"],
        "teacher": memory.always["teacher weights"],
        "payload": training["teacher payload"],
        "update": sum(size for name, size in training.items() if name != "teacher payload"),
    }


def _one_rank(rank: int, config: Config, ranks: int, folder: str) -> None:
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    measured: list[Any] = [None] * ranks
    dist.all_gather_object(measured, measure(config))
    if rank == 0:
        torch.save([vars(one) for one in measured], f"{folder}/measured")
    dist.destroy_process_group()


def _measured_by_processes(config: Config, ranks: int) -> list[Measured]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_one_rank, (config, ranks, folder), ranks)
        return [Measured(**one) for one in torch.load(f"{folder}/measured")]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.plan_check", description=__doc__.splitlines()[0]
    )
    for name, default in vars(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = Sizes(**vars(parser.parse_args()))
    table = Table("", *training_columns(), title="MiB of the fullest rank in training, predicted / measured")
    with tempfile.TemporaryDirectory() as folder:
        save_configs(Path(folder), sizes)
        for name, overrides in LAYOUTS.items():
            config = config_of(Path(folder), sizes, overrides)
            parallel = config.parallel
            ranks = parallel.tensor * parallel.pipeline * parallel.context * (parallel.data or 1)
            setting = Setting.of(config, ranks, "cpu")
            fullest = max(_measured_by_processes(config, ranks), key=lambda one: one.total)
            predicted = training_parts(stage_memory(setting, fullest.stage))
            table.add_row(name, *_cells(predicted, fullest))
    Console(width=140).print(table)


def training_columns() -> tuple[str, ...]:
    """Headings after the layout's."""
    return ("weights", "gradients", "state", "teacher", "payload", "update", "total", "error")


def _cells(predicted: dict[str, int], measured: Measured) -> list[str]:
    total = sum(predicted.values())
    pairs = [(size, getattr(measured, name)) for name, size in predicted.items()]
    cells = [f"{one / 2**20:.1f} / {other / 2**20:.1f}" for one, other in [*pairs, (total, measured.total)]]
    return [*cells, f"{total / measured.total - 1:+.1%}"]


if __name__ == "__main__":
    main()
