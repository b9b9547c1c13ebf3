"""The training loop: rollout -> score -> forward/backward -> optimizer step -> log -> (evaluate, save).

The embedded rollout engine shares the student's weights; servers are given them after every step, and may draw the
rollouts of the next steps while one trains.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist

from megatron_opd.checkpoint.hf_export import save_hf
from megatron_opd.config.load import changed_keys, load_config, save_resolved
from megatron_opd.config.schema import Config
from megatron_opd.data.rollouts import Rollout
from megatron_opd.errors import UserError
from megatron_opd.evaluation.evaluate import metrics_of
from megatron_opd.models.gpt import GPT
from megatron_opd.report.run_log import RunLog
from megatron_opd.rollout.stream import staleness
from megatron_opd.training.agreement import alarm
from megatron_opd.training.job import Job, set_up
from megatron_opd.training.router_metrics import take_router_metrics
from megatron_opd.training.serving import Publish, drawn, serving, unserved
from megatron_opd.training.task_scores import task_scores
from megatron_opd.training.teacher_process import only_teaches, teach
from megatron_opd.training.teaching import teaching
from megatron_opd.training.update import means_over_tokens

HELDOUT_SEED_OFFSET = 1_000_003  # held-out rollouts have noise of their own, the same at every evaluation


def train(config: Config) -> None:
    """Run or resume the training that `config` describes. Collective: every rank calls it."""
    if only_teaches(config):
        teach(config)
        return
    job = set_up(config)
    start, steps = resume(job), config.training.steps
    rank_0 = dist.get_rank() == 0
    changes = changes_since(config) if start else []
    if rank_0:
        save_resolved(config, config.run_dir)
    decode = job.texts.tokenizer.decode
    with (
        RunLog(config.run_dir, start=start, steps=steps, enabled=rank_0, decode=decode) as log,
        teaching(job, log.say) if start < steps else nullcontext(),
        serving(job, log.say) as publish,
    ):
        for line in [*job.notes(start), *(f"changed from step {start} on: {change}" for change in changes)]:
            log.say(line)
        if start < steps:
            publish(start)
        if start == 0 and job.texts.evaluated:
            log.record(0, evaluate(job, 0, publish))
        for step in range(start + 1, steps + 1):
            metrics, rollouts = train_step(job, step, publish)
            drawing = step < steps or job.texts.evaluated  # with the weights of this step
            metrics["sync_seconds"] = publish(step) if drawing else 0.0
            if job.texts.evaluated and due(step, config.evaluation.every, steps):
                metrics |= evaluate(job, step, publish)
            log.record(step, metrics, rollouts)
            warning = alarm(metrics, config.rollout)
            if warning is not None:
                log.say(f"step {step}: {warning}")
            if due(step, config.checkpoint.save_every, steps):
                save(job, step)
        export = config.run_dir / "hf" if config.checkpoint.export_hf else None
        if export is not None:
            architecture, source = job.architecture, config.student.path
            save_hf(job.student.chunks, architecture, job.groups, source, export, replace=True)
        log.summarise(checkpoint=config.run_dir / "checkpoints" / "latest", export=export)
    job.teacher.finish()
    dist.destroy_process_group()


def due(step: int, every: int, steps: int) -> bool:
    """Whether something done every so many steps (0: never) and after the last is due after `step`."""
    return step == steps or (every > 0 and step % every == 0)


def train_step(job: Job, step: int, publish: Publish = unserved) -> tuple[dict[str, Any], list[Rollout]]:
    """Take rollouts, let the models score them, apply the updates. Returns the step's metrics and rollouts."""
    began = time.perf_counter()
    rollouts = drawn(lambda: job.rollouts.take(step), publish, step - 1)
    taken = time.perf_counter()
    updates = job.score(rollouts)
    scored = time.perf_counter()
    job.student.start_step()
    progress = (step - 1) / max(1, job.config.training.steps - 1)
    outcomes = [job.apply(update, progress) for update in updates]
    if job.average is not None:
        job.average.hand_over()
    trained = time.perf_counter()
    tokens = sum(update.scale.loss_tokens for update in updates)
    return {
        **means_over_tokens(outcomes, tokens),
        "tokens": tokens,
        "response_tokens": sum(len(rollout.response_ids) for rollout in rollouts) / len(rollouts),
        "truncated": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
        "grad_norm": sum(outcome.grad_norm for outcome in outcomes) / len(outcomes),
        "lr": job.student.learning_rate,
        **staleness(rollouts, step - 1),
        "skipped": sum(not outcome.applied for outcome in outcomes),
        **take_router_metrics(job.student.chunks, job.groups),
        "rollout_seconds": taken - began,
        "teacher_seconds": scored - taken,
        "train_seconds": trained - scored,
        **job.teacher.metrics(),
    }, rollouts


def evaluate(job: Job, step: int, publish: Publish = unserved) -> dict[str, float]:
    """What `evaluation` asks for: held-out reverse KL, and the scores of tasks, which rank 0 alone returns."""
    metrics = evaluate_heldout(job, step, publish) if job.texts.heldout else {}
    if job.texts.tasks:
        metrics |= metrics_of(task_scores(job, step, publish))
    return metrics


def evaluate_heldout(job: Job, step: int, publish: Publish = unserved) -> dict[str, float]:
    """Held-out reverse KL in nats per token, on the student's own rollouts from the held-out prompts.

    With a teacher behind servers it is an estimate, see `Job.heldout_reverse_kl`.
    """
    began = time.perf_counter()
    seed = job.config.seed + HELDOUT_SEED_OFFSET
    rollouts = drawn(
        lambda: job.draw(job.texts.heldout, step=step, seed=seed, samples=1, trained=False), publish, step
    )
    means, tokens = job.heldout_reverse_kl(rollouts)
    return {
        **{f"eval/{name}": value for name, value in means.items()},
        "eval/response_tokens": tokens / len(rollouts),
        "eval/seconds": time.perf_counter() - began,
    }


def changes_since(config: Config) -> list[str]:
    """What differs from the configuration that the run directory was last used with."""
    saved = config.run_dir / "config.yaml"
    return changed_keys(load_config(saved, []), config) if saved.is_file() else []


def save(job: Job, step: int) -> None:
    """Write the checkpoint of `step`: model, optimizer, prompt position, and a teacher that follows the student."""
    state = {"prompts": job.prompts.state_dict()}
    job.teacher.before_save(step)
    with moving_teacher(job) as teacher:
        job.checkpoints.save(step, job.student.chunks, job.student.optimizer, state, teacher)


def moving_teacher(job: Job) -> AbstractContextManager[Sequence[GPT]]:
    """Chunks of the average that the teacher becomes; none where it keeps its weights."""
    return nullcontext(()) if job.average is None else job.average.as_model()


def resume(job: Job) -> int:
    """Load the newest intact checkpoint of the run directory, if there is one; returns its step, else 0."""
    folder = job.checkpoints.newest_intact()
    if folder is None:
        return 0
    with moving_teacher(job) as teacher:
        state = job.checkpoints.load(folder, job.student.chunks, job.student.optimizer, teacher)
    job.prompts.load_state_dict(state["prompts"])
    job.student.continue_after(state["step"])
    if state["step"] > job.config.training.steps:
        raise UserError(
            f"training.steps: {job.config.training.steps} is less than the {state['step']} steps that run_dir "
            f"{job.config.run_dir} has behind it: raise it, or give a new run_dir"
        )
    return state["step"]
