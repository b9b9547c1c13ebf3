"""The checks of a run that need no process group: made before processes start, and again by each of them."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch

from megatron_opd.config.checks import check_layout
from megatron_opd.config.layout_checks import check_teacher_layout
from megatron_opd.config.rollout import SGLangConfig
from megatron_opd.config.schema import (
    SERVED_KINDS,
    Config,
    ParallelConfig,
    TeacherConfig,
    TeacherParallelConfig,
)
from megatron_opd.config.section import Section
from megatron_opd.config.self_distillation import check_same_model
from megatron_opd.config.several_teachers import check_several_teachers
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import Architecture, ServedModel, read_architecture, read_served
from megatron_opd.objectives.gates import Gate
from megatron_opd.objectives.objective import Objective
from megatron_opd.objectives.policy_gradient import PolicyGradient
from megatron_opd.objectives.shaping import Shaping
from megatron_opd.objectives.token_weights import TokenWeight

MEMORY_SHARE = "--mem-fraction-static"  # SGLang's argument
Settings = TypeVar("Settings", Gate, PolicyGradient, Shaping, TokenWeight)
Model = TypeVar("Model")


@dataclass(frozen=True)
class Checked:
    """What the checks found out on the way. `parallel.data` is filled in."""

    student: Architecture
    teacher: Architecture | None  # None: it is behind servers, or there are several
    reference: Architecture | None
    parallel: ParallelConfig
    objective: Objective
    served: ServedModel | None = None  # the teacher behind servers
    teacher_parallel: TeacherParallelConfig | None = None  # None: the student's layout
    teachers: Mapping[str, Architecture] = field(default_factory=dict)  # several, by name

    @property
    def architectures(self) -> list[Architecture]:
        """Of all models that the processes of the run hold."""
        models = (self.student, self.teacher, *self.teachers.values(), self.reference)
        return [arch for arch in models if arch is not None]

    def with_teacher(self, name: str) -> "Checked":
        """The same with one of several teachers as the teacher; vocabulary and padding stay those of all."""
        return replace(self, teacher=self.teachers[name])

    @property
    def vocab_size(self) -> int:
        """Ids that all models have."""
        sizes = [arch.vocab_size for arch in self.architectures]
        return min(sizes if self.served is None else [*sizes, self.served.vocab_size])

    @property
    def padded_vocab_size(self) -> int:
        """Rows of every embedding and head: all models are padded to the same number."""
        return max(arch.padded_vocab_size(self.parallel.tensor) for arch in self.architectures)


def check_before_start(config: Config, world_size: int, *, elsewhere: bool = False) -> Checked:
    """Checks that `config` can run on `world_size` processes; `elsewhere`: on machines whose GPUs are not known here.

    Raises UserError as `check_models` and `check_server_gpus`, for a missing prompt file, for a run directory that is
    none and for what SGLang cannot be started with.
    """
    if config.run_dir.exists() and not config.run_dir.is_dir():
        raise UserError(f"run_dir: {config.run_dir} is a file, not a folder")
    checked = check_models(config, world_size)
    for key, path in (
        ("data.prompts", config.data.prompts),
        ("evaluation.prompts", config.evaluation.prompts),
        *((f"evaluation.tasks.{name}.path", task.path) for name, task in config.evaluation.tasks.items()),
    ):
        if path is not None and not path.exists():
            raise UserError(f"{key}: {path} does not exist")
    for section, servers in (("rollout", config.rollout.sglang), ("teacher", config.teacher.sglang)):
        python = servers.python
        if python is not None and not os.access(python, os.X_OK):
            raise UserError(
                f"{section}.sglang.python: {python} is no program: name the interpreter, .../bin/python"
            )
    if not elsewhere and os.environ.get("RANK", "0") == "0":  # whose machine the servers are started on
        told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE")
        check_server_gpus(config, int(told or min(world_size, max(1, torch.cuda.device_count()))))
    teacher = config.teacher
    if teacher.sglang.python is not None and not any(teacher.folder.glob("*.safetensors")):
        raise UserError(
            f"teacher.path: {teacher.path} has no *.safetensors for the servers to load: name a Hugging Face folder, "
            "or give teacher.sglang.urls"
        )
    check_cache_folder(config)
    return checked


def check_cache_folder(config: Config) -> None:
    """Whether there can be a folder, and weights to know the teacher by. Raises UserError."""
    teacher = config.teacher
    if teacher.cache is None:
        return
    from megatron_opd.checkpoint.fingerprint import weight_files  # brings megatron-core, which takes seconds

    if teacher.cache.exists() and not teacher.cache.is_dir():
        raise UserError(f"teacher.cache: {teacher.cache} is a file, not a folder")
    for key, folder in teacher.folders.items():
        if not weight_files(folder):
            raise UserError(
                f"teacher.cache: {key} {folder} has no weights to know the teacher by: name the folder that the "
                "servers serve, or leave it null"
            )


def check_models(config: Config, world_size: int) -> Checked:
    """Checks what needs no more than the configuration and the models' config.json.

    Raises UserError for a missing or unsupported model, an objective whose settings do not go together, or a
    layout that does not fit `world_size` processes.
    """
    check_several_teachers(config)
    objective = build_objective(config)
    student = _read("student.path", config.student.path, read_architecture)
    served, teacher = None, None
    teachers = {
        name: _read(f"teacher.paths.{name}", folder, read_architecture)
        for name, folder in config.teacher.paths.items()
    }
    if config.teacher.engine == "sglang":
        served = _read("teacher.path", config.teacher.folder, read_served)
    elif not teachers:
        teacher = _read("teacher.path", config.teacher.folder, read_architecture)
        if config.teacher.ema is not None:
            check_same_model(student, teacher)
    reference = None
    if config.reference is not None:
        reference = _read("reference.path", config.reference.path, read_architecture)
    parallel = check_layout(config, student, teacher, world_size, reference, served=served, teachers=teachers)
    own = check_teacher_layout(config, teacher, world_size)
    for name, arch in teachers.items():
        own = check_teacher_layout(config, arch, world_size, f"teacher {name}")
    return Checked(student, teacher, reference, parallel, objective, served, own, teachers)


def build_objective(config: Config) -> Objective:
    """The objective that `config.objective` describes, at the temperature of the rollouts.

    Raises UserError naming the key for settings that do not go together.
    """
    section = config.objective
    gate = _settings(Gate, "gate", section.gate)
    policy = _settings(PolicyGradient, "policy", section.policy)
    shaping = _settings(Shaping, "shaping", section.shaping)
    token_weight = _settings(TokenWeight, "token_weight", section.token_weight)
    try:
        objective = Objective(
            divergence=section.divergence,
            beta=section.beta,
            support=section.support,
            k=section.k,
            remainder=section.remainder,
            gate=gate,
            policy=policy,
            shaping=shaping,
            token_weight=token_weight,
            temperature=config.rollout.temperature,
            kept_ids_only=section.kept_ids_only,
        )
    except ValueError as error:
        raise UserError(f"objective.{error}") from None
    return _served(objective, config.teacher)


def _served(objective: Objective, teacher: TeacherConfig) -> Objective:
    """Of a teacher that gives log-probs: servers do at temperature 1, ours at that of the rollouts."""
    servers = teacher.engine == "sglang"
    if not servers and teacher.payload not in SERVED_KINDS:
        return objective
    try:
        return replace(objective, served_at=1.0 if servers else objective.temperature)
    except ValueError as error:
        remedy = "" if servers else ", or set teacher.payload to hidden_states"
        raise UserError(f"objective.{error}{remedy}") from None


def _settings(kind: type[Settings], key: str, section: Section) -> Settings:
    """The settings of a part of the objective; their ValueErrors begin with the field."""
    try:
        return kind(**section.model_dump())
    except ValueError as error:
        raise UserError(f"objective.{key}.{error}") from None


def _read(key: str, folder: Path, read: Callable[[Path], Model]) -> Model:
    try:
        return read(folder)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def check_offload(config: Config, *, gpu: bool | None = None, engine: bool | None = None) -> None:
    """Raises UserError when something is to be kept in host memory and the machine cannot, or has nothing else.

    `gpu` and `engine` say whether it has a GPU and transformer-engine. None: what this machine has.
    """
    cuda = torch.cuda.is_available() if gpu is None else gpu
    engine = find_spec("transformer_engine") is not None if engine is None else engine
    models = {"teacher": config.teacher, "reference": config.reference}
    for role, model in models.items():
        if model is not None and model.offload and not cuda:
            raise UserError(
                f"{role}.offload: without a GPU the weights are in host memory anyway: set it to false"
            )
    if config.optimizer.cpu_offload and not (cuda and engine):
        raise UserError(
            "optimizer.cpu_offload: megatron-core's needs a GPU and the package transformer-engine: set it to false"
        )


def check_devices(processes: int) -> None:
    """Raises UserError when this machine has GPUs, but fewer than `processes`."""
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and gpus < processes:
        raise UserError(f"parallel: {processes} processes need {processes} GPUs, but this machine has {gpus}")


def check_server_gpus(config: Config, training: int) -> None:
    """Raises UserError when started servers are given GPUs that this machine lacks, or that others use too.

    `training` processes of the run are on this machine, and use its first GPUs. A server takes most of a GPU's memory
    unless its arguments say how much.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    sections = {"rollout.sglang": config.rollout.sglang, "teacher.sglang": config.teacher.sglang}
    used = {section: _gpus_used(served, count) for section, served in sections.items()}
    users = {"the training processes": set(range(training)), **used}
    for section, served in sections.items():
        missing = [gpu for gpu in served.gpus if gpu >= count]
        if missing:
            there = f"has GPUs 0 to {count - 1}" if count else "has no GPU"
            raise UserError(f"{section}.gpus: {missing[0]} is not there, this machine {there}: remove it")
        told = any(word.partition("=")[0] == MEMORY_SHARE for word in served.arguments)
        for user, theirs in users.items():
            shared = theirs & used[section]
            if user != section and shared and not told:
                raise UserError(
                    f"{section}.gpus: GPU {min(shared)} is used by {user} too: name another, or add {MEMORY_SHARE} "
                    f"with the part of its memory that a server takes to {section}.arguments"
                )
    if config.rollout.weight_sync == "distributed" and 0 in used["rollout.sglang"]:
        raise UserError(
            "rollout.sglang.gpus: weight_sync distributed needs other GPUs than 0, which sends them: name others, "
            "or set rollout.weight_sync to tensor"
        )


def _gpus_used(served: SGLangConfig, count: int) -> set[int]:
    """The GPUs of servers that the run starts, of `count`: SGLang by itself takes the first."""
    if served.gpus or not count or served.python is None:
        return set(served.gpus)
    return set() if any(word.startswith("--base-gpu-id") for word in served.arguments) else {0}
