"""One evaluation: responses to all tasks, drawn by all ranks, graded by rank 0, kept as JSONL."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_opd.checkpoint.folders import alike
from megatron_opd.config.schema import Config
from megatron_opd.data.prompts import Prompt
from megatron_opd.data.rollouts import Rollout, write_objects
from megatron_opd.errors import UserError, why_refused
from megatron_opd.evaluation.answers import extract_answer, normalised
from megatron_opd.evaluation.grading import RIGHT, Grader
from megatron_opd.evaluation.scores import Graded, TaskScores, scores_of
from megatron_opd.evaluation.tasks import Task
from megatron_opd.rollout.sampling import Sampling

Draw = Callable[[Sequence[Prompt], Sampling], list[Rollout]]
"""Responses to all prompts, in prompt order, then sample order, the same on every rank. Collective."""


@dataclass(frozen=True)
class Drawing:
    """How responses are drawn. `together` is how many at once at most, None: all of a task."""

    draw: Draw
    stop_ids: tuple[int, ...]
    decode: Callable[[Sequence[int]], str]  # without special tokens
    together: int | None


def drawn_together(config: Config) -> int | None:
    """For memory's sake: what the training ranks decode in a step. Servers queue by themselves."""
    rollout = config.rollout
    return rollout.prompts_per_step * rollout.samples_per_prompt if rollout.engine == "local" else None


def evaluate_tasks(
    tasks: Sequence[Task], drawing: Drawing, config: Config, folder: Path, group: dist.ProcessGroup
) -> dict[str, TaskScores]:
    """The scores of every task on rank 0 of `group`, {} elsewhere; its samples are written to `folder`/NAME.jsonl.

    Collective over `group`: those of `drawing`, and 1 object all-gather a task. Raises UserError on every rank alike.
    """
    scores = {}
    with Grader() as grader:
        for task in tasks:
            sampling = task.sampling(config.rollout, stop_ids=drawing.stop_ids, seed=config.seed)
            rollouts = _draw_in_turns(task, drawing, sampling)
            with alike(group):
                if group.rank() == 0:
                    samples = list(graded(task, rollouts, drawing.decode, grader))
                    _keep(folder / f"{task.name}.jsonl", samples)
                    k = task.config.k
                    each = [_scored(samples[start : start + k]) for start in range(0, len(samples), k)]
                    scores[task.name] = scores_of(each, config.seed)
    return scores


def _draw_in_turns(task: Task, drawing: Drawing, sampling: Sampling) -> list[Rollout]:
    together = len(task.prompts) if drawing.together is None else max(1, drawing.together // sampling.n)
    turns = [task.prompts[start : start + together] for start in range(0, len(task.prompts), together)]
    return [rollout for turn in turns for rollout in drawing.draw(turn, sampling)]


def graded(
    task: Task, rollouts: Sequence[Rollout], decode: Callable[[Sequence[int]], str], grader: Grader
) -> Iterator[dict[str, Any]]:
    """What is kept of every sample: its text, the answer found in it, and what that is worth."""
    for number, rollout in enumerate(rollouts):
        index = number // task.config.k
        assert rollout.prompt_id == task.prompts[index].id, "in prompt order, then sample order"
        response = decode(rollout.response_ids)
        complete = rollout.finish_reason == "stop"
        answer = extract_answer(response, complete=complete, numbers=task.numbers)
        score, trouble = (0.0, "no answer") if answer is None else task.judge(grader, index, answer)
        yield {
            "problem": index,
            "sample": rollout.sample,
            "prompt": task.prompts[index].text,
            "response": response,
            "answer": answer,
            "expected": task.expected[index],
            "right": score >= RIGHT,
            "score": score,
            "tokens": len(rollout.response_ids),
            "finish_reason": rollout.finish_reason,
        } | ({"trouble": trouble} if trouble else {})


def _scored(samples: Sequence[Mapping[str, Any]]) -> list[Graded]:
    return [
        Graded(
            right=sample["right"],
            answer=None if sample["answer"] is None else normalised(sample["answer"]),
            score=sample["score"],
            tokens=sample["tokens"],
            truncated=sample["finish_reason"] == "length",
        )
        for sample in samples
    ]


def _keep(path: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """Write the graded responses. Raises UserError for a full disk."""
    try:
        write_objects(path, samples)
    except OSError as error:
        raise UserError(f"cannot write {path}: {why_refused(error) or error.strerror}") from None


def metrics_of(scores: Mapping[str, TaskScores]) -> dict[str, float]:
    """The scores as a row of metrics: eval/TASK/avg@8 with its interval in avg@8_low and _high, and so on."""
    metrics: dict[str, float] = {}
    for name, task in scores.items():
        for metric, estimate in task.metrics.items():
            metrics[f"eval/{name}/{metric}"] = estimate.mean
            metrics[f"eval/{name}/{metric}_low"] = estimate.low
            metrics[f"eval/{name}/{metric}_high"] = estimate.high
        for key in ("score", "tokens", "truncated", "unanswered"):
            metrics[f"eval/{name}/{key}"] = getattr(task, key)
    return metrics


def as_json(scores: Mapping[str, TaskScores]) -> dict[str, Any]:
    """The scores as an object by task."""
    return {name: asdict(task) for name, task in scores.items()}
