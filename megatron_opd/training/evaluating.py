"""Evaluations while a run trains: held-out reverse KL, and the scores of tasks, with the weights of a step."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_opd.data.prompts import Prompt
from megatron_opd.data.rollouts import Rollout
from megatron_opd.evaluation.evaluate import Drawing, drawn_together, evaluate_tasks, metrics_of
from megatron_opd.evaluation.scores import TaskScores
from megatron_opd.parallel.groups import all_ranks
from megatron_opd.rollout.sampling import Sampling
from megatron_opd.rollout.sharded import generate_sharded
from megatron_opd.training.job import Job
from megatron_opd.training.serving import Publish, Served, drawn, unserved
from megatron_opd.watch.phases import EVALUATION

HELDOUT_SEED_OFFSET = 1_000_003  # held-out rollouts have noise of their own, the same at every evaluation


def evaluate(job: Job, step: int, publish: Publish = unserved) -> dict[str, float]:
    """What `evaluation` asks for: held-out reverse KL, and the scores of tasks, which rank 0 alone returns."""
    metrics: dict[str, float] = {}
    with job.phases(EVALUATION):
        if job.texts.heldout:
            metrics |= evaluate_heldout(job, step, publish)
        if job.texts.tasks:
            folder = job.config.run_dir / "evaluation" / f"step_{step:08d}"
            metrics |= metrics_of(task_scores(job, step, publish, folder))
    return metrics | {"eval/seconds": job.phases.seconds[EVALUATION]}


def evaluate_heldout(job: Job, step: int, publish: Publish = unserved) -> dict[str, float]:
    """Held-out reverse KL in nats per token, on the student's own rollouts from the held-out prompts.

    With a teacher behind servers it is an estimate, see `Job.heldout_reverse_kl`.
    """
    seed = job.config.seed + HELDOUT_SEED_OFFSET
    rollouts = drawn(
        lambda: job.draw(job.texts.heldout, step=step, seed=seed, samples=1, trained=False), publish, step
    )
    means, tokens = job.heldout_reverse_kl(rollouts)
    return {
        **{f"eval/{name}": value for name, value in means.items()},
        "eval/response_tokens": tokens / len(rollouts),
    }


def task_scores(model: Served, step: int, publish: Publish, folder: Path) -> dict[str, TaskScores]:
    """By task, on rank 0; {} elsewhere. Samples are kept in `folder`.

    Collective over the model's ranks. Raises UserError on every rank alike.
    """
    engine, texts, config, groups = model.engine, model.texts, model.config, model.groups

    def draw(prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        def once() -> list[Rollout]:
            return generate_sharded(engine, prompts, sampling, weight_version=step, group=groups.dp_cp)

        with model.phases(EVALUATION):
            return drawn(once, publish, step)

    decode = partial(texts.tokenizer.decode, skip_special_tokens=True)
    drawing = Drawing(draw, texts.stop_ids, decode, drawn_together(config))
    return evaluate_tasks(texts.tasks, drawing, config, folder, all_ranks(groups))
