"""Conditions that span several keys, the models and the number of processes: checked before anything is
built.

Pure functions of plain values. Each raises UserError with one line that names the key and the remedy.
"""

from collections.abc import Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

from megatron_opd.config.evaluation import check_tasks
from megatron_opd.config.layout_checks import (
    ModelSizes,
    ServedSizes,
    alignment_of_run,
    check_divisible,
    check_experts,
    check_order,
    data_parallel_size,
    teacher_processes,
)
from megatron_opd.config.rollout import RolloutConfig, SGLangConfig
from megatron_opd.config.schema import CheckpointConfig, Config, ParallelConfig
from megatron_opd.config.self_distillation import check_self_distillation
from megatron_opd.config.server_checks import check_servers, check_teacher
from megatron_opd.config.teacher_cache import check_teacher_cache
from megatron_opd.errors import UserError


def check_fields(config: Config) -> None:
    """Conditions between keys alone."""
    training = config.training
    check_order("parallel", config.parallel)
    if config.teacher.parallel is not None:
        check_order("teacher.parallel", config.teacher.parallel)
    check_tasks(config.evaluation)
    batch = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    if training.updates_per_rollout > batch:
        raise UserError(
            f"training.updates_per_rollout: {training.updates_per_rollout} updates need a rollout each, but a "
            f"step has {batch} (rollout.prompts_per_step * rollout.samples_per_prompt): lower it"
        )
    _check_kept_checkpoints(config.checkpoint)
    _check_optimizer(config)
    _check_microbatch(config)
    _check_engine(config.rollout)
    check_teacher(config)
    check_self_distillation(config)
    check_teacher_cache(config)
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
    teachers: Mapping[str, ModelSizes] | None = None,
) -> ParallelConfig:
    """Conditions between `config`, the models and the number of processes, `check_fields` included.

    A teacher behind servers is `served`, several are `teachers`, and `teacher` is None. Returns the student's layout
    with `data` filled in; that of a teacher with its own has to fit too (`check_teacher_layout`).
    """
    check_fields(config)
    data = data_parallel_size(config.parallel, world_size, others=teacher_processes(config))
    rollout = config.rollout
    batch = rollout.prompts_per_step * rollout.samples_per_prompt
    if batch < data:
        raise UserError(
            f"rollout.prompts_per_step: {rollout.prompts_per_step} prompts of {rollout.samples_per_prompt} "
            f"samples leave some of the {data} data-parallel replicas without any: raise it, or start fewer processes"
        )
    if config.training.moe_aux_loss is not None and not student.num_experts:
        raise UserError("training.moe_aux_loss: the student has no experts to balance: leave it null")
    several = {f"teacher {name}": model for name, model in (teachers or {}).items()}
    roles = {"student": student, "teacher": teacher, **several, "reference": reference}
    models = {role: model for role, model in roles.items() if model is not None}
    sizes: dict[str, ServedSizes] = {**models, **({"teacher": served} if served else {})}
    shared = min(model.vocab_size for model in sizes.values())
    if rollout.engine == "sglang" and student.vocab_size > shared:
        raise UserError(
            f"rollout.engine: SGLang draws from all {student.vocab_size} tokens of the student, but another model has "
            f"only {shared}: set it to local"
        )
    alike = {
        role: m
        for role, m in models.items()
        if not role.startswith("teacher") or config.teacher.parallel is None
    }
    check_divisible("parallel", config.parallel, alike)
    check_experts("parallel", config.parallel, alike, data)
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


def _check_kept_checkpoints(checkpoint: CheckpointConfig) -> None:
    every, saved = checkpoint.keep_every, checkpoint.save_every
    if every and (not saved or every % saved):
        when = f"checkpoints are saved every {saved} steps" if saved else "only the last step is saved"
        raise UserError(
            f"checkpoint.keep_every: {every} is no multiple of checkpoint.save_every, {when}: change one of them, or "
            "set keep_every to 0"
        )


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
    budget, shards = config.training.microbatch_tokens, alignment_of_run(config)
    for role in ("student", "teacher"):
        key, longest = _longest_sequence(config, role)
        needed = -(-longest // shards) * shards
        if needed > budget:
            raise UserError(
                f"training.microbatch_tokens: {budget} cannot hold {key} + "
                f"rollout.max_new_tokens = {longest} tokens: raise it to {needed} at least, or lower these"
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
    if role.startswith("teacher") and config.teacher.max_prompt_tokens is not None:
        return "teacher.max_prompt_tokens", config.teacher_prompt_tokens + config.rollout.max_new_tokens
    return "data.max_prompt_tokens", config.data.max_prompt_tokens + config.rollout.max_new_tokens
