"""Conditions that span several keys, the models and the number of processes: checked before anything is
built.

Pure functions of plain values. Each raises UserError with one line that names the key and the remedy.
"""

import math
from ipaddress import ip_address
from typing import Protocol
from urllib.parse import urlsplit

from megatron_opd.config.rollout import RolloutConfig, SGLangConfig
from megatron_opd.config.schema import Config, ParallelConfig
from megatron_opd.config.self_distillation import check_self_distillation
from megatron_opd.config.server_checks import check_servers, check_teacher
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


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Replicas of the model on `world_size` processes. Raises UserError unless it fills them exactly."""
    replica = parallel.tensor * parallel.pipeline * parallel.context
    product = "parallel.tensor * parallel.pipeline * parallel.context"
    if parallel.data is not None and replica * parallel.data != world_size:
        raise UserError(
            f"parallel: {product} * parallel.data is {replica * parallel.data}, but {world_size} processes "
            f"run: start {replica * parallel.data} processes, or leave parallel.data null"
        )
    if world_size % replica:
        raise UserError(
            f"parallel: {product} is {replica}, which does not divide the {world_size} processes that run: "
            f"start a multiple of {replica}"
        )
    return world_size // replica


def segment_alignment(tensor: int, context: int, sequence_parallel: bool) -> int:
    """What the length of every packed segment is a multiple of.

    Context parallelism cuts it into two chunks a rank, sequence parallelism a rank's share into one a rank.
    """
    return (2 * context if context > 1 else 1) * (tensor if sequence_parallel else 1)


def check_fields(config: Config) -> None:
    """Conditions between keys alone."""
    training, parallel = config.training, config.parallel
    if parallel.sequence_parallel and parallel.tensor == 1:
        raise UserError("parallel.sequence_parallel: needs parallel.tensor > 1: set it to false")
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise UserError("parallel.virtual_pipeline: needs parallel.pipeline > 1: set it to 1")
    if config.evaluation.every and config.evaluation.prompts is None:
        raise UserError(
            "evaluation.every: there is nothing to evaluate on: give evaluation.prompts, or set it to 0"
        )
    batch = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    if training.updates_per_rollout > batch:
        raise UserError(
            f"training.updates_per_rollout: {training.updates_per_rollout} updates need a rollout each, but a "
            f"step has {batch} (rollout.prompts_per_step * rollout.samples_per_prompt): lower it"
        )
    _check_optimizer(config)
    _check_microbatch(config)
    _check_engine(config.rollout)
    check_teacher(config)
    check_self_distillation(config)
    _check_objective(config)
    if config.objective.kept_ids_only:
        _check_kept_ids(config.rollout)


def check_layout(
    config: Config,
    student: ModelSizes,
    teacher: ModelSizes | None,
    world_size: int,
    reference: ModelSizes | None = None,
    *,
    served: ServedSizes | None = None,
) -> ParallelConfig:
    """Conditions between `config`, the models and the number of processes, `check_fields` included.

    A teacher behind servers is `served`, and `teacher` is None. Returns the layout with `data` filled in.
    """
    check_fields(config)
    data = data_parallel_size(config.parallel, world_size)
    rollout = config.rollout
    batch = rollout.prompts_per_step * rollout.samples_per_prompt
    if batch < data:
        raise UserError(
            f"rollout.prompts_per_step: {rollout.prompts_per_step} prompts of {rollout.samples_per_prompt} "
            f"samples leave some of the {data} data-parallel replicas without any: raise it, or start fewer processes"
        )
    if config.training.moe_aux_loss is not None and not student.num_experts:
        raise UserError("training.moe_aux_loss: the student has no experts to balance: leave it null")
    roles = {"student": student, "teacher": teacher, "reference": reference}
    models = {role: model for role, model in roles.items() if model is not None}
    sizes: dict[str, ServedSizes] = {**models, **({"teacher": served} if served else {})}
    shared = min(model.vocab_size for model in sizes.values())
    if rollout.engine == "sglang" and student.vocab_size > shared:
        raise UserError(
            f"rollout.engine: SGLang draws from all {student.vocab_size} tokens of the student, but another model has "
            f"only {shared}: set it to local"
        )
    _check_divisible(config.parallel, models)
    _check_experts(config.parallel, models, data)
    for role, model in sizes.items():
        _check_rollout(config, role, model)
        if config.objective.support != "full" and config.objective.k > model.vocab_size:
            raise UserError(
                f"objective.k: {config.objective.k} is more than the {role}'s vocabulary of {model.vocab_size}: "
                "lower it, or set objective.support to full"
            )
    return config.parallel.model_copy(update={"data": data})


def _check_engine(rollout: RolloutConfig) -> None:
    """The engine reads its own keys only, and reports log-probs at the temperature it drew with."""
    if rollout.engine == "local":
        if rollout.sglang != SGLangConfig():
            raise UserError(
                "rollout.sglang: the engine local reads nothing of it: set rollout.engine to sglang"
            )
        if rollout.weight_sync != "disk":
            raise UserError(
                "rollout.weight_sync: the engine local has the student's weights anyway: remove it, or set "
                "rollout.engine to sglang"
            )
        if rollout.max_staleness:
            raise UserError(
                "rollout.max_staleness: the engine local draws with the student itself, never ahead of it: set it to "
                "0, or rollout.engine to sglang"
            )
        return
    if rollout.max_batch is not None:
        raise UserError("rollout.max_batch: the engine local reads it: use rollout.sglang.concurrency")
    check_servers("rollout.sglang", rollout.sglang)
    elsewhere = [url for url in rollout.sglang.urls if not _on_this_machine(url)]
    if rollout.weight_sync == "tensor" and elsewhere:
        raise UserError(
            f"rollout.weight_sync: tensor is for servers on this machine, unlike {elsewhere[0]} of "
            "rollout.sglang.urls: set it to disk or distributed"
        )
    if rollout.temperature != 1 and (rollout.top_k == 1 or rollout.temperature < 1e-6):
        raise UserError(
            "rollout.temperature: SGLang takes the likeliest token here and reports its log-prob at temperature 1: set "
            "it to 1, and rollout.top_k to 1 for that token"
        )


def _on_this_machine(url: str) -> bool:
    """Whether a URL names the machine by a loopback address."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_optimizer(config: Config) -> None:
    """Keys of the optimizer among themselves and with the length of the run."""
    optimizer, steps = config.optimizer, config.training.steps
    if optimizer.warmup_steps > steps:
        raise UserError(
            f"optimizer.warmup_steps: {optimizer.warmup_steps} is more than training.steps = {steps}: lower it"
        )
    if optimizer.min_lr > optimizer.lr:
        raise UserError(
            f"optimizer.min_lr: {optimizer.min_lr:g} is more than optimizer.lr = {optimizer.lr:g}: lower it"
        )
    if optimizer.cpu_offload and optimizer.distributed is False:
        raise UserError("optimizer.cpu_offload: needs optimizer.distributed: set that to true or null")
    if optimizer.name != "sgd":
        return
    if optimizer.cpu_offload:
        raise UserError("optimizer.cpu_offload: sgd has no state to offload: set it to false")
    for key in ("beta1", "beta2", "eps"):
        if getattr(optimizer, key) != type(optimizer).model_fields[key].default:
            raise UserError(f"optimizer.{key}: only adam reads it: remove it, or set optimizer.name to adam")
    if optimizer.distributed:
        raise UserError(
            "optimizer.distributed: sgd has no state to shard, and megatron-core shards adam's only: leave it null"
        )


def _check_objective(config: Config) -> None:
    """What the objective needs from outside its section, and the keys of it that only data and checks read."""
    weight, mask = config.objective.shaping.reference_weight, config.objective.mask
    if weight != 1.0 and config.reference is None:
        raise UserError(
            f"reference: objective.shaping.reference_weight = {weight:g} needs a reference model: give "
            "reference.path, or set objective.shaping.reference_weight to 1"
        )
    if weight == 1.0 and config.reference is not None:
        raise UserError(
            "reference: nothing reads this model while objective.shaping.reference_weight is 1: set that, or "
            "remove reference"
        )
    if config.objective.policy.baseline != "none" and config.training.updates_per_rollout > 1:
        raise UserError(
            "objective.policy.baseline: the expected reward of the student that wrote the responses is known for "
            "the first update only: set it to none, or training.updates_per_rollout to 1"
        )
    if mask.occurrences != "first" and not mask.tokens:
        raise UserError(
            f"objective.mask.occurrences: {mask.occurrences} is read with objective.mask.tokens only: give some, "
            "or leave it at first"
        )


def _check_kept_ids(rollout: RolloutConfig) -> None:
    """A restriction to the ids that sampling keeps needs some to be cut, and some to be left."""
    if rollout.top_p == 1 and rollout.top_k == 0:
        raise UserError(
            "objective.kept_ids_only: sampling keeps every id: set rollout.top_p below 1 or rollout.top_k above 1, or "
            "leave it false"
        )
    if rollout.top_k == 1:
        raise UserError(
            "objective.kept_ids_only: rollout.top_k = 1 keeps one id, to which both models then give all probability: "
            "raise it"
        )


def _check_microbatch(config: Config) -> None:
    """The longest sequence, padded to whole shards, has to fit a microbatch."""
    budget, parallel = config.training.microbatch_tokens, config.parallel
    shards = segment_alignment(parallel.tensor, parallel.context, parallel.sequence_parallel)
    for role in ("student", "teacher"):
        key, longest = _longest_sequence(config, role)
        needed = -(-longest // shards) * shards
        if needed > budget:
            raise UserError(
                f"training.microbatch_tokens: {budget} cannot hold {key} + "
                f"rollout.max_new_tokens = {longest} tokens: raise it to {needed} at least, or lower these"
            )


def _check_divisible(parallel: ParallelConfig, models: dict[str, ModelSizes]) -> None:
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
    for key, size, counts in (
        ("parallel.tensor", parallel.tensor, heads | groups | widths),
        ("parallel.pipeline", parallel.pipeline, layers),
        ("parallel.virtual_pipeline", parallel.virtual_pipeline, chunks),
    ):
        common = math.gcd(*counts.values())
        fitting = ", ".join(str(divisor) for divisor in range(1, common + 1) if common % divisor == 0)
        for what, count in counts.items():
            if count % size:
                raise UserError(f"{key}: {size} does not divide the {count} {what}: use one of {fitting}")


def _check_experts(parallel: ParallelConfig, models: dict[str, ModelSizes], data: int) -> None:
    """Experts over EP, EP over the processes that hold the same layers."""
    counts = {role: model.num_experts for role, model in models.items() if model.num_experts}
    expert, key = parallel.expert, "parallel.expert"
    if expert > 1 and not counts:
        raise UserError(f"{key}: {expert} processes have no experts to share, no model has any: set it to 1")
    for role, count in counts.items():
        if count % expert:
            raise UserError(f"{key}: {expert} does not divide the {count} experts of the {role}: lower it")
        if parallel.tensor > 1 and not parallel.sequence_parallel:
            raise UserError(
                f"parallel.sequence_parallel: the {role} has experts, which need it when parallel.tensor > 1: set it "
                "to true"
            )
    processes = parallel.tensor * parallel.context * data
    if processes % expert:
        raise UserError(
            f"{key}: {expert} does not divide parallel.tensor * parallel.context * parallel.data = {processes}: lower "
            "it, or start more processes (launch local starts parallel.data replicas)"
        )


def _check_rollout(config: Config, role: str, model: ServedSizes) -> None:
    """The longest sequence has to fit the positions of the model, top-k its vocabulary."""
    top_k = config.rollout.top_k
    key, longest = _longest_sequence(config, role)
    if longest > model.max_positions:
        raise UserError(
            f"rollout.max_new_tokens: {key} + rollout.max_new_tokens = {longest} tokens, "
            f"but the {role} has {model.max_positions} positions: lower one of them"
        )
    if top_k > model.vocab_size:
        raise UserError(
            f"rollout.top_k: {top_k} is more than the {model.vocab_size} tokens of the {role}'s vocabulary: "
            "lower it, or set it to 0 for off"
        )


def _longest_sequence(config: Config, role: str) -> tuple[str, int]:
    """What limits the prompts that a model reads, and tokens of the longest with the longest response."""
    if role == "teacher" and config.teacher.max_prompt_tokens is not None:
        return "teacher.max_prompt_tokens", config.teacher_prompt_tokens + config.rollout.max_new_tokens
    return "data.max_prompt_tokens", config.data.max_prompt_tokens + config.rollout.max_new_tokens
