"""Config -> the objects of a run, in the order in which mistakes are cheapest to find.

Configuration and files are checked first, then process groups are made, then weights are read.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import PreTrainedTokenizerBase

from megatron_opd.checkpoint.folders import hold
from megatron_opd.checkpoint.store import CheckpointStore
from megatron_opd.checkpoint.weights import load_model_weights
from megatron_opd.config.schema import Config
from megatron_opd.data.packing import Microbatch, pack
from megatron_opd.data.prompts import LoadedPrompts, Prompt, PromptStream, load_prompts
from megatron_opd.data.rollouts import Rollout
from megatron_opd.data.tokenizer import check_same_tokenizer, load_tokenizer, stop_ids
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import Architecture
from megatron_opd.models.gpt import GPT, build_gpt
from megatron_opd.objectives import Objective
from megatron_opd.parallel import cpu
from megatron_opd.parallel.groups import ParallelLayout, build_groups
from megatron_opd.preflight import Checked, check_before_start
from megatron_opd.rollout.local import LocalEngine
from megatron_opd.rollout.sampling import Sampling
from megatron_opd.rollout.sharded import generate_sharded
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.training.student import Student, build_student
from megatron_opd.training.update import ObjectivePass, UpdateScale


@dataclass(frozen=True)
class Texts:
    """Tokenizer and prompts of a run. `vocab_size` is the vocabulary that student and teacher share."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    stop_ids: tuple[int, ...]
    training: LoadedPrompts
    heldout: list[Prompt]
    notes: list[str]  # what the user should know, a line each


@dataclass(frozen=True)
class Job:
    """Everything a run works with. Every rank has one."""

    config: Config
    layout: ParallelLayout
    groups: ProcessGroupCollection
    device: torch.device
    architecture: Architecture
    student: Student
    teacher: MegatronTeacher
    objective: ObjectivePass
    engine: LocalEngine
    texts: Texts
    prompts: PromptStream
    checkpoints: CheckpointStore

    def notes(self, start: int) -> list[str]:
        """What the user should know before the first step, a line each."""
        steps = self.config.training.steps
        begin = f"resuming at step {start}" if start else "starting"
        if start == steps:
            begin = f"finished already ({steps} steps; raise training.steps to go on)"
        device = (
            f"{self.device.type}, {torch.get_num_threads()} threads" if self.device.type == "cpu" else "cuda"
        )
        engine = ["transformer-engine is installed; its layers are not used yet, megatron-core's own are"]
        return [
            *(engine if find_spec("transformer_engine") else []),
            *self.texts.notes,
            f"{begin}: {self.layout}, {self.config.precision} on {device}; {len(self.texts.training.prompts)} prompts",
        ]

    def draw(self, prompts: Sequence[Prompt], *, step: int, seed: int, samples: int) -> list[Rollout]:
        """Responses of all prompts drawn with the current weights; the same list on every rank."""
        settings = self.config.rollout
        sampling = Sampling(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            stop_ids=self.texts.stop_ids,
            n=samples,
            seed=seed,
        )
        return generate_sharded(self.engine, prompts, sampling, weight_version=step, group=self.groups.dp)

    def pack(self, rollouts: Sequence[Rollout]) -> tuple[list[Microbatch], UpdateScale]:
        """This rank's microbatches of an update, on its device, and the scale of the whole update."""
        packed = pack(
            rollouts,
            dp_size=self.layout.data,
            token_budget=self.config.training.microbatch_tokens,
            alignment=self.layout.tensor if self.layout.sequence_parallel else 1,
        )
        mine = [microbatch.to(self.device) for microbatch in packed[self.groups.dp.rank()]]
        return mine, UpdateScale.of(packed)


def init_distributed() -> torch.device:
    """Join the processes that the launcher started (or be the only one); returns this rank's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = timedelta(minutes=30)
        backend = "nccl" if cuda else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return device


def set_up(config: Config) -> Job:
    """Check everything that can be checked, then build the models and load their weights.

    Raises UserError for anything the user can mend. Collective: every rank calls it.
    """
    checked = check_before_start(config, int(os.environ.get("WORLD_SIZE", "1")))
    texts = read_texts(config, min(checked.student.vocab_size, checked.teacher.vocab_size))
    parallel = checked.parallel
    assert parallel.data is not None
    layout = ParallelLayout(
        parallel.tensor, parallel.pipeline, parallel.context, parallel.data, parallel.sequence_parallel
    )
    if os.environ.get("RANK", "0") == "0":
        hold(config.run_dir)
    cpu.install()
    device = init_distributed()
    groups = build_groups(layout)
    gpt, teacher = load_models(config, checked, layout, groups, device)
    student = build_student(
        gpt, config.optimizer, groups, precision=config.precision, steps=config.training.steps
    )
    objective = Objective(
        divergence=config.objective.divergence,
        token_weight=config.objective.token_weight.kind,
        gamma=config.objective.token_weight.gamma,
        unit_mean=config.objective.token_weight.unit_mean,
        temperature=config.rollout.temperature,
    )
    # The engine draws no id that either model lacks.
    drawn = replace(checked.student, vocab_size=texts.vocab_size)
    return Job(
        config=config,
        layout=layout,
        groups=groups,
        device=device,
        architecture=checked.student,
        student=student,
        teacher=teacher,
        objective=ObjectivePass(gpt, teacher, objective, texts.vocab_size, groups, config.objective.check),
        engine=LocalEngine(gpt, drawn, groups, max_batch=config.rollout.max_batch),
        texts=texts,
        prompts=PromptStream(texts.training.prompts, seed=config.seed, shuffle=config.data.shuffle),
        checkpoints=CheckpointStore(
            config.run_dir / "checkpoints",
            config.checkpoint.keep_last,
            groups,
            config.student.path,
            identity={
                "student architecture": str(checked.student),
                "data.prompts (SHA-256 of their tokens)": texts.training.digest,
                "data.shuffle": str(config.data.shuffle),
                "seed": str(config.seed),
            },
        ),
    )


def load_models(
    config: Config,
    checked: Checked,
    layout: ParallelLayout,
    groups: ProcessGroupCollection,
    device: torch.device,
) -> tuple[GPT, MegatronTeacher]:
    """Student and teacher with their weights, in one layout; both vocabularies are padded to the same size."""
    padded = max(arch.padded_vocab_size(layout.tensor) for arch in (checked.student, checked.teacher))

    def load(arch: Architecture, folder: Path, recompute: str) -> GPT:
        model = build_gpt(
            arch,
            layout,
            groups,
            precision=config.precision,
            padded_vocab_size=padded,
            recompute=recompute,
        )
        load_model_weights(model, arch, folder, groups=groups, padded_vocab_size=padded)
        return model.to(device)

    teacher = MegatronTeacher(load(checked.teacher, config.teacher.path, "none"), groups)
    return load(checked.student, config.student.path, config.training.recompute), teacher


def read_texts(config: Config, vocab_size: int) -> Texts:
    """Read tokenizers and prompts. Raises UserError when the tokenizers differ or a prompt file is broken."""
    tokenizer = load_tokenizer(config.student.path)
    warning = check_same_tokenizer(tokenizer, load_tokenizer(config.teacher.path))
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"student.path: the tokenizer has {len(tokenizer)} tokens, the models only {vocab_size} rows: "
            "use the tokenizer that belongs to the models"
        )

    def load(path: Path) -> LoadedPrompts:
        return load_prompts(
            path,
            tokenizer,
            field=config.data.prompt_field,
            max_prompt_tokens=config.data.max_prompt_tokens,
            system_prompt=config.data.system_prompt,
        )

    training = load(config.data.prompts)
    heldout = load(config.evaluation.prompts) if config.evaluation.prompts is not None else None
    notes = [*([warning] if warning else []), *training.notes, *(heldout.notes if heldout else [])]
    return Texts(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        stop_ids=stop_ids(config.student.path, tokenizer),
        training=training,
        heldout=heldout.prompts[: config.evaluation.max_prompts] if heldout else [],
        notes=notes,
    )
