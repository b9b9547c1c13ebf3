"""The keys of evaluations: held-out reverse KL, and tasks with right answers."""

from typing import Any

from pydantic import Field

from megatron_opd.config.section import Count, LocalPath, Name, PositiveInt, Section
from megatron_opd.errors import UserError


class TaskConfig(Section):
    """A task: problems with right answers, from files or from a generator of reasoning-gym."""

    path: LocalPath | None = Field(
        None,
        description="JSONL, JSON, parquet or CSV file, a folder of such files, or a folder that `datasets` has saved.",
    )
    split: str | None = Field(
        None,
        description="Part of a folder that has several, test say: a saved split, or files with it in their name. null: "
        "there is only one.",
    )
    prompt_column: str | None = Field(
        None,
        description="Column of the problem, text or chat messages. null: the first there is of problem, question, "
        "prompt, query, input.",
    )
    answer_column: str | None = Field(
        None,
        description="Column of the right answer; a dot leads into an object. null: the first there is of answer, "
        "final_answer, expected_answer, ground_truth, reward_model.ground_truth, target, solution.",
    )
    reasoning_gym: str | None = Field(
        None,
        description="Generator of reasoning-gym in the place of `path`, chain_sum say; its scorer grades.",
    )
    size: PositiveInt = Field(100, description="reasoning_gym: problems that are made.")
    seed: Count = Field(0, description="reasoning_gym: seed of the problems.")
    options: dict[str, Any] = Field(
        {}, description="reasoning_gym: settings of the generator, such as min_terms."
    )
    template: str = Field(
        "{problem}", description="What the model reads as the user's message; {problem} is the problem."
    )
    system_prompt: str | None = Field(
        None, description="System message before every problem. null: what the chat template does by itself."
    )
    max_problems: PositiveInt | None = Field(None, description="Problems used: the first ones. null: all.")
    k: PositiveInt = Field(1, description="Responses to every problem, for avg@k, pass@k and maj@k.")
    max_new_tokens: PositiveInt | None = Field(
        None, description="Tokens of a response at most. null: `rollout.max_new_tokens`."
    )
    temperature: float | None = Field(
        None, ge=0, description="Of the responses; 0 takes the likeliest token. null: `rollout.temperature`."
    )
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus sampling. null: `rollout.top_p`.")
    top_k: Count | None = Field(None, description="Likeliest tokens kept, 0: all. null: `rollout.top_k`.")


class EvaluationConfig(Section):
    """What is measured before the first step and after the last, and every so many steps."""

    prompts: LocalPath | None = Field(
        None,
        description="Held-out prompts, a file or directory like `data.prompts`: reverse KL on the student's own "
        "rollouts. null: none.",
    )
    tasks: dict[Name, TaskConfig] = Field(
        {}, description="Tasks by name, graded: their metrics are eval/NAME/avg@k, pass@k and maj@k."
    )
    every: Count = Field(
        0, description="Also evaluate every so many steps. 0: only before the first and after the last."
    )
    max_prompts: PositiveInt = Field(128, description="Prompts used of `prompts`: the first of the file.")


def check_tasks(config: EvaluationConfig) -> None:
    """Every task has one source, and keys of that source only. Raises UserError."""
    defaults = TaskConfig()
    for name, task in config.tasks.items():
        key = f"evaluation.tasks.{name}"
        if (task.path is None) == (task.reasoning_gym is None):
            raise UserError(
                f"{key}: give either path, problems from files, or reasoning_gym, a generator of them"
            )
        unread = ("size", "seed", "options")
        if task.path is None:
            unread = ("split", "prompt_column", "answer_column")
        for other in unread:
            if getattr(task, other) != getattr(defaults, other):
                source = "reasoning_gym" if task.path is not None else "path"
                raise UserError(f"{key}.{other}: only tasks with {source} read it: remove it")
        if "{problem}" not in task.template:
            raise UserError(f"{key}.template: has to hold {{problem}}, which stands for the problem")
        if task.k > 1 and task.temperature == 0:
            raise UserError(f"{key}.k: at temperature 0 all {task.k} responses are the same: set it to 1")
    if config.every and config.prompts is None and not config.tasks:
        raise UserError(
            "evaluation.every: there is nothing to evaluate on: give evaluation.prompts or evaluation.tasks, or set it "
            "to 0"
        )
