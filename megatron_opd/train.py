"""The training loop: rollout -> score -> forward/backward -> optimizer step -> log -> (evaluate, save).

The embedded rollout engine shares the student's weights; servers are given them after every step, and may draw the
rollouts of the next steps while one trains.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch.distributed as dist

from megatron_opd.checkpoint.hf_export import save_hf
from megatron_opd.config.load import save_resolved
from megatron_opd.config.schema import Config
from megatron_opd.data.rollouts import Rollout
from megatron_opd.parallel.groups import all_ranks
from megatron_opd.report.positions import Diagnostics
from megatron_opd.report.run_log import RunLog
from megatron_opd.rollout.sharded import RolloutsStopped
from megatron_opd.rollout.stream import staleness
from megatron_opd.training.agreement import alarm
from megatron_opd.training.evaluating import evaluate
from megatron_opd.training.job import Job, set_up
from megatron_opd.training.router_metrics import take_router_metrics
from megatron_opd.training.saving import Saves, changes_since, resume
from megatron_opd.training.serving import Publish, drawn, serving, unserved
from megatron_opd.training.teacher_process import only_teaches, teach
from megatron_opd.training.teaching import teaching
from megatron_opd.training.update import diagnostics_of, means_over_tokens
from megatron_opd.watch.phases import ROLLOUT, SAVE, STEP, SYNC, TEACHER
from megatron_opd.watch.stopping import Stopping
from megatron_opd.watch.watchdog import Watchdog


def train(config: Config) -> bool:
    """Run or resume the training that `config` describes. Collective: every rank calls it.

    Returns whether all steps are done; otherwise a signal has stopped it, and its state is saved.
    """
    with Stopping() as stopping:
        return teach(config, stopping) if only_teaches(config) else learn(config, stopping)


def learn(config: Config, stopping: Stopping) -> bool:
    """The part of the ranks that have the student."""
    job = set_up(config, lambda: stopping.requested)
    start, steps = resume(job), config.training.steps
    rank_0 = dist.get_rank() == 0
    changes = changes_since(config) if start else []
    if rank_0:
        save_resolved(config, config.run_dir)
    decode = job.texts.tokenizer.decode
    with (
        Watchdog(job.phases, config.timeouts.limits, config.run_dir),
        RunLog(config.run_dir, start=start, steps=steps, enabled=rank_0, decode=decode) as log,
        teaching(job, log.say) if start < steps else nullcontext(),
        serving(job, log.say) as publish,
        Saves(job) as saves,
    ):
        for line in [*job.notes(start), *(f"changed from step {start} on: {change}" for change in changes)]:
            log.say(line)
        if start < steps:
            with job.phases(SYNC):
                publish(start)
        if start == 0 and job.texts.evaluated:
            log.record(0, evaluate(job, 0, publish))
        stopping.begin()
        done = take_steps(job, start, log, publish, saves, stopping)
        if done < steps:
            log.say(stopping.farewell(done))
            if stopping.by_hand:
                log.report()
            stopping.leave()
        else:
            export = config.run_dir / "hf" if config.checkpoint.export_hf else None
            if export is not None:
                architecture, source = job.architecture, config.student.path
                with job.phases(SAVE):
                    save_hf(job.student.chunks, architecture, job.groups, source, export, replace=True)
            if start < steps:
                log.say(saves.cost())
            log.summarise(checkpoint=config.run_dir / "checkpoints" / "latest", export=export)
    job.teacher.finish(early=done < steps)
    dist.destroy_process_group()
    return done == steps


def take_steps(job: Job, start: int, log: RunLog, publish: Publish, saves: Saves, stopping: Stopping) -> int:
    """The steps after `start`, to the last or until a signal stops the run; returns how many are behind it, saved."""
    config, done, saved, steps = job.config, start, start, job.config.training.steps
    while done < steps and not stops(job, stopping):
        step = done + 1
        try:
            metrics, rollouts, diagnostics = train_step(job, step, publish, saves.advance)
        except RolloutsStopped:
            continue
        stopped = step < steps and stops(job, stopping)
        evaluating = bool(job.texts.evaluated) and due(step, config.evaluation.every, steps)
        drawing = not stopped and (step < steps or evaluating)  # with the weights of this step
        with job.phases(SYNC):
            metrics["sync_seconds"] = publish(step) if drawing else 0.0
        if evaluating and not stopped:
            metrics |= evaluate(job, step, publish)
        metrics["save_seconds"] = saves.take_seconds()
        log.record(step, metrics, rollouts, diagnostics)
        warning = alarm(metrics, config.rollout)
        if warning is not None:
            log.say(f"step {step}: {warning}")
        if stopped or due(step, config.checkpoint.save_every, steps):
            saves.begin(step)
            saved = step
        else:
            saves.advance()
        if evaluating and stopped:  # once all is saved: it may take longer than the run is given
            saves.finish()
            with job.phases(SYNC):
                publish(step)
            log.complete(step, evaluate(job, step, publish))
        done = step
    if saved < done:
        saves.begin(done)
    saves.finish()
    return done


def stops(job: Job, stopping: Stopping) -> bool:
    """Whether a signal stops the run here, on every rank alike. Collective over the student's ranks."""
    with job.phases(STEP):
        return stopping.agreed(all_ranks(job.groups), job.device) is not None


def due(step: int, every: int, steps: int) -> bool:
    """Whether something done every so many steps (0: never) and after the last is due after `step`."""
    return step == steps or (every > 0 and step % every == 0)


def train_step(
    job: Job, step: int, publish: Publish = unserved, between: Callable[[], None] = lambda: None
) -> tuple[dict[str, Any], list[Rollout], Diagnostics]:
    """Take rollouts, let the models score them, apply the updates; `between` these all ranks call `between`.

    Returns the step's metrics and rollouts, and what is known of the rollouts' tokens.
    """
    phases = job.phases
    with phases(ROLLOUT):
        rollouts = drawn(lambda: job.rollouts.take(step), publish, step - 1)
    between()
    with phases(TEACHER):
        updates = job.score(rollouts)
    between()
    with phases(STEP):
        job.student.start_step()
        progress = (step - 1) / max(1, job.config.training.steps - 1)
        outcomes = [job.apply(update, progress) for update in updates]
        if job.average is not None:
            job.average.hand_over()
    tokens = sum(update.scale.loss_tokens for update in updates)
    metrics = {
        **means_over_tokens(outcomes, tokens),
        "tokens": tokens,
        "response_tokens": sum(len(rollout.response_ids) for rollout in rollouts) / len(rollouts),
        "truncated": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
        "grad_norm": sum(outcome.grad_norm for outcome in outcomes) / len(outcomes),
        "lr": job.student.learning_rate,
        **staleness(rollouts, step - 1),
        "skipped": sum(not outcome.applied for outcome in outcomes),
        **take_router_metrics(job.student.chunks, job.groups),
        "rollout_seconds": phases.seconds[ROLLOUT],
        "teacher_seconds": phases.seconds[TEACHER],
        "train_seconds": phases.seconds[STEP],
        **job.teacher.metrics(),
    }
    return metrics, rollouts, diagnostics_of(outcomes, updates, job.objective.positions)
