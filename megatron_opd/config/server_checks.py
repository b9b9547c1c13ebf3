"""Conditions between the keys of SGLang servers, those of the rollouts and those of a teacher."""

from megatron_opd.config.rollout import SGLangConfig
from megatron_opd.config.schema import SERVED_KINDS, Config, PayloadKind, TeacherConfig
from megatron_opd.errors import UserError

OWNED_ARGUMENTS = {
    "--api-key",
    "--config",
    "--context-length",
    "--dtype",
    "--host",
    "--json-model-override-args",
    "--model",
    "--model-path",
    "--port",
    "--sampling-mask-max-tokens",
    "--weight-version",
}
"""Arguments of sglang.launch_server that follow from the rest of the configuration."""


def check_servers(section: str, served: SGLangConfig) -> None:
    """Servers are started or running already, and the keys are of the one or the other. Raises UserError."""
    if (served.python is None) == (not served.urls):
        raise UserError(
            f"{section}: give either python, the interpreter of an environment with SGLang, or urls of running servers"
        )
    for key in ("servers", "host", "gpus", "arguments"):
        if served.urls and getattr(served, key) != getattr(SGLangConfig(), key):
            raise UserError(
                f"{section}.{key}: of servers that the run starts, and urls has others: remove one"
            )
    if len(served.gpus) % served.servers or len(set(served.gpus)) < len(served.gpus):
        raise UserError(
            f"{section}.gpus: give every server the same number, each GPU once: {len(set(served.gpus))} for "
            f"{served.servers} servers do not go"
        )
    owned = sorted(set(word.partition("=")[0] for word in served.arguments) & OWNED_ARGUMENTS)
    if owned:
        raise UserError(f"{section}.arguments: {owned[0]} is set by the run: remove it")


def check_teacher(config: Config) -> None:
    """The engine of the teacher reads its own keys only; servers score at temperature 1. Raises UserError."""
    teacher = config.teacher
    if teacher.engine == "megatron":
        for key in ("sglang", "request_tokens"):
            if getattr(teacher, key) != TeacherConfig.model_fields[key].default:
                raise UserError(
                    f"teacher.{key}: the engine megatron does not read it: set teacher.engine to sglang"
                )
        _check_payload(teacher.payload, config.objective.support)
        return
    if teacher.payload != TeacherConfig.model_fields["payload"].default:
        raise UserError(
            "teacher.payload: servers give what the objective reads: remove it, or set teacher.engine to megatron"
        )
    check_servers("teacher.sglang", teacher.sglang)
    if teacher.parallel is not None:
        raise UserError(
            "teacher.parallel: with teacher.engine sglang its servers have their own layout: remove it"
        )
    if teacher.offload:
        raise UserError("teacher.offload: with teacher.engine sglang nothing of it is here: set it to false")
    if config.objective.support.startswith("student_topk") and config.training.updates_per_rollout > 1:
        raise UserError(
            "training.updates_per_rollout: servers score the student's likeliest ids before the first update only: set "
            "it to 1, or objective.support to teacher_topk"
        )
    if config.evaluation.prompts is not None and config.rollout.temperature != 1:
        raise UserError(
            "evaluation.prompts: servers score at temperature 1, and the held-out responses are drawn at "
            f"{config.rollout.temperature:g}: leave it null, or set rollout.temperature to 1"
        )


def _check_payload(payload: PayloadKind, support: str) -> None:
    """The ids of log-probs that a Megatron teacher hands over are those that the objective reads."""
    if payload not in SERVED_KINDS:
        return
    if support.startswith("student_topk"):
        raise UserError(
            f"teacher.payload: {payload} has no log-probs of the student's likeliest ids, which objective.support "
            f"{support} reads: set it to hidden_states"
        )
    if payload == "topk" and support == "full":
        raise UserError(
            "teacher.payload: nothing reads the ids of topk while objective.support is full: set it to sampled or "
            "hidden_states"
        )
    if payload == "sampled" and support != "full":
        raise UserError(
            f"teacher.payload: sampled has no ids, which objective.support {support} reads: set it to topk or "
            "hidden_states"
        )
