"""Whether a layout fits the models that are spread so, and the number of processes.

Pure functions of plain values; `key` is the section of the layout, as errors name it. Each raises UserError with one
line that names the key and the remedy.
"""

import math
from typing import Protocol

from megatron_opd.config.schema import Config, ParallelConfig, TeacherParallelConfig
from megatron_opd.errors import UserError


class ServedSizes(Protocol):
    """The sizes of a model that prompts and responses have to fit, wherever it runs."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_positions(self) -> int: ...


class ModelSizes(ServedSizes, Protocol):
    """The sizes of a model that a layout has to fit. Counts are of the whole model."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_groups(self) -> int: ...
    @property
    def ffn_size(self) -> int: ...  # not read of a model with experts
    @property
    def num_experts(self) -> int: ...  # a layer; 0 for a dense model


def processes_needed(parallel: ParallelConfig) -> int:
    """Processes that the layout asks for; one replica where `parallel.data` is left open."""
    return parallel.tensor * parallel.pipeline * parallel.context * (parallel.data or 1)


def data_parallel_size(
    parallel: ParallelConfig, world_size: int, *, key: str = "parallel", others: int = 0
) -> int:
    """Replicas of the model on `world_size` processes, all but the `others` that are for another model.

    Raises UserError, about the layout `key`, unless it fills them exactly.
    """
    replica, ours = parallel.tensor * parallel.pipeline * parallel.context, world_size - others
    product = f"{key}.tensor * {key}.pipeline * {key}.context"
    run = f"{world_size} processes run" + (f", {others} of them for the teacher alone" if others else "")
    if parallel.data is not None and replica * parallel.data != ours:
        raise UserError(
            f"{key}: {product} * {key}.data is {replica * parallel.data}, but {run}: start "
            f"{replica * parallel.data + others} processes, or leave {key}.data null"
        )
    if ours < 1:
        raise UserError(f"{key}: {run}, which leaves none for the student: start {replica + others} or more")
    if ours % replica:
        more = f" and {others}" if others else ""
        raise UserError(
            f"{key}: {product} is {replica}, which does not divide the {ours} processes that run: start a multiple of "
            f"{replica}{more}"
        )
    return ours // replica


def teacher_processes(config: Config) -> int:
    """Processes that are the teacher's alone."""
    own = config.teacher.parallel
    return processes_needed(own) if own is not None and own.separate else 0


def processes_of_run(config: Config) -> int:
    """Processes that all layouts of a run ask for."""
    return processes_needed(config.parallel) + teacher_processes(config)


def alignment_of_run(config: Config) -> int:
    """What the length of every packed segment is a multiple of: student and teacher read the same microbatches."""
    layouts = [config.parallel, *([config.teacher.parallel] if config.teacher.parallel else [])]
    return math.lcm(
        *(segment_alignment(each.tensor, each.context, each.sequence_parallel) for each in layouts)
    )


def check_teacher_layout(
    config: Config, teacher: ModelSizes | None, world_size: int, role: str = "teacher"
) -> TeacherParallelConfig | None:
    """The layout of a teacher that has its own, with `data` filled in; None: it has the student's, or none."""
    own, key = config.teacher.parallel, "teacher.parallel"
    if own is None or teacher is None:
        return None
    if own.separate and config.teacher.offload:
        raise UserError(
            "teacher.offload: processes of the teacher alone do nothing else meanwhile: set it to false"
        )
    data = own.data or 1
    if not own.separate:
        data = data_parallel_size(own, world_size, key=key)
    check_divisible(key, own, {role: teacher})
    check_experts(key, own, {role: teacher}, data)
    return own.model_copy(update={"data": data})


def segment_alignment(tensor: int, context: int, sequence_parallel: bool) -> int:
    """What the length of every packed segment is a multiple of.

    Context parallelism cuts it into two chunks a rank, sequence parallelism a rank's share into one a rank.
    """
    return (2 * context if context > 1 else 1) * (tensor if sequence_parallel else 1)


def check_order(key: str, parallel: ParallelConfig) -> None:
    """What the keys of a layout need of each other."""
    if parallel.sequence_parallel and parallel.tensor == 1:
        raise UserError(f"{key}.sequence_parallel: needs {key}.tensor > 1: set it to false")
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise UserError(f"{key}.virtual_pipeline: needs {key}.pipeline > 1: set it to 1")


def check_divisible(key: str, parallel: ParallelConfig, models: dict[str, ModelSizes]) -> None:
    """Heads, key-value heads and dense layers' width over TP, layers over PP and its chunks, in every model."""
    heads = {f"attention heads of the {role}": model.num_heads for role, model in models.items()}
    groups = {f"key-value heads of the {role}": model.num_kv_groups for role, model in models.items()}
    widths = {
        f"feed-forward channels of the {role}": model.ffn_size
        for role, model in models.items()
        if not model.num_experts  # experts are never cut
    }
    layers = {f"layers of the {role}": model.num_layers for role, model in models.items()}
    chunks = {
        f"layers of the {role} in a pipeline process": model.num_layers // parallel.pipeline
        for role, model in models.items()
    }
    for part, size, counts in (
        ("tensor", parallel.tensor, heads | groups | widths),
        ("pipeline", parallel.pipeline, layers),
        ("virtual_pipeline", parallel.virtual_pipeline, chunks),
    ):
        common = math.gcd(*counts.values())
        fitting = ", ".join(str(divisor) for divisor in range(1, common + 1) if common % divisor == 0)
        for what, count in counts.items():
            if count % size:
                raise UserError(
                    f"{key}.{part}: {size} does not divide the {count} {what}: use one of {fitting}"
                )


def check_experts(key: str, parallel: ParallelConfig, models: dict[str, ModelSizes], data: int) -> None:
    """Experts over EP, EP over the processes that hold the same layers."""
    counts = {role: model.num_experts for role, model in models.items() if model.num_experts}
    expert = parallel.expert
    if expert > 1 and not counts:
        raise UserError(
            f"{key}.expert: {expert} processes have no experts to share, no model has any: set it to 1"
        )
    for role, count in counts.items():
        if count % expert:
            raise UserError(
                f"{key}.expert: {expert} does not divide the {count} experts of the {role}: lower it"
            )
        if parallel.tensor > 1 and not parallel.sequence_parallel:
            raise UserError(
                f"{key}.sequence_parallel: the {role} has experts, which need it when {key}.tensor > 1: set it "
                "to true"
            )
    processes = parallel.tensor * parallel.context * data
    if processes % expert:
        raise UserError(
            f"{key}.expert: {expert} does not divide {key}.tensor * {key}.context * {key}.data = {processes}: lower "
            "it, or start more processes (launch local starts {key}.data replicas)"
        )
