"""The scores of a run's tasks while it trains: drawn by its rollout engine with the weights of a step."""

from collections.abc import Sequence
from functools import partial

from megatron_opd.data.prompts import Prompt
from megatron_opd.data.rollouts import Rollout
from megatron_opd.evaluation.evaluate import Drawing, drawn_together, evaluate_tasks
from megatron_opd.evaluation.scores import TaskScores
from megatron_opd.parallel.groups import all_ranks
from megatron_opd.rollout.sampling import Sampling
from megatron_opd.rollout.sharded import generate_sharded
from megatron_opd.training.job import Job
from megatron_opd.training.serving import Publish, drawn


def task_scores(job: Job, step: int, publish: Publish) -> dict[str, TaskScores]:
    """By task, on rank 0; {} elsewhere. Samples are kept in `evaluation/step_...` of the run directory.

    Collective over the student's ranks. Raises UserError on every rank alike.
    """
    engine, texts, config = job.engine, job.texts, job.config

    def draw(prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        def once() -> list[Rollout]:
            return generate_sharded(engine, prompts, sampling, weight_version=step, group=job.groups.dp_cp)

        return drawn(once, publish, step)

    decode = partial(texts.tokenizer.decode, skip_special_tokens=True)
    drawing = Drawing(draw, texts.stop_ids, decode, drawn_together(config))
    folder = config.run_dir / "evaluation" / f"step_{step:08d}"
    return evaluate_tasks(texts.tasks, drawing, config, folder, all_ranks(job.groups))
