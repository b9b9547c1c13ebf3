"""Tasks as they are drawn and graded: problems as prompts, their answers, and how responses are sampled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_opd.config.evaluation import TaskConfig
from megatron_opd.config.rollout import RolloutConfig
from megatron_opd.config.schema import Config
from megatron_opd.data.prompts import Message, Prompt, chat_messages, tokenise
from megatron_opd.errors import UserError
from megatron_opd.evaluation.answers import as_number, expected_answer
from megatron_opd.evaluation.grading import Grader, Verdict
from megatron_opd.evaluation.records import column_of, read_records, value_of
from megatron_opd.rollout.sampling import Sampling

PROMPT_COLUMNS = ("problem", "question", "prompt", "query", "input")
ANSWER_COLUMNS = (
    "answer",
    "final_answer",
    "expected_answer",
    "ground_truth",
    "reward_model.ground_truth",
    "target",
    "solution",
)
SEED_OFFSET = 2_000_003  # responses to tasks have noise of their own, the same at every evaluation


@dataclass(frozen=True)
class Task:
    """A task of a run. `prompts` and `expected` go together; the id of a prompt begins with the task's name."""

    name: str
    config: TaskConfig
    prompts: list[Prompt]
    expected: list[str]

    @property
    def generator(self) -> dict[str, Any]:
        """What reasoning-gym makes the problems of; empty for problems from files."""
        return _generator(self.config)

    @property
    def numbers(self) -> bool:
        """Whether the last number of a response may be its answer: always for problems of mathematics."""
        return not self.generator or all(as_number(answer) is not None for answer in self.expected)

    def judge(self, grader: Grader, index: int, answer: str) -> Verdict:
        """What an answer to the problem at `index` is worth."""
        if self.generator:
            return grader.score(self.generator, index, answer)
        return grader.grade(answer, self.expected[index])

    def sampling(self, rollout: RolloutConfig, *, stop_ids: tuple[int, ...], seed: int) -> Sampling:
        """How its responses are drawn: as the task says, else as rollouts are."""

        def own(key: str) -> Any:
            value = getattr(self.config, key)
            return getattr(rollout, key) if value is None else value

        return Sampling(
            max_new_tokens=own("max_new_tokens"),
            temperature=own("temperature"),
            top_p=own("top_p"),
            top_k=own("top_k"),
            stop_ids=stop_ids,
            n=self.config.k,
            seed=seed + SEED_OFFSET,
            tells_cut=False,
        )


def read_tasks(config: Config, tokenizer: PreTrainedTokenizerBase, max_positions: int) -> list[Task]:
    """The tasks of a run with all their problems.

    Raises UserError for a file or a generator that is none, problems without answer, and those whose prompt leaves no
    room for a response among `max_positions`.
    """
    tasks = []
    with Grader() as grader:
        for name, settings in config.evaluation.tasks.items():
            key = f"evaluation.tasks.{name}"
            try:
                task = _read(name, settings, tokenizer, grader)
            except UserError as error:
                raise UserError(f"{key}: {error}") from None
            longest = max(len(prompt.token_ids) for prompt in task.prompts)
            response = settings.max_new_tokens or config.rollout.max_new_tokens
            if longest + response > max_positions:
                raise UserError(
                    f"{key}.max_new_tokens: its longest prompt has {longest} tokens, with {response} of a response it "
                    f"exceeds the model's {max_positions} positions: lower it"
                )
            tasks.append(task)
    return tasks


def longest_sequence(tasks: Sequence[Task], rollout: RolloutConfig) -> int:
    """Tokens of the longest prompt of all tasks with its longest response; 0 without tasks."""
    return max(
        (
            len(prompt.token_ids) + (task.config.max_new_tokens or rollout.max_new_tokens)
            for task in tasks
            for prompt in task.prompts
        ),
        default=0,
    )


def _read(name: str, config: TaskConfig, tokenizer: PreTrainedTokenizerBase, grader: Grader) -> Task:
    pairs = _generated(config, grader) if config.reasoning_gym is not None else _from_files(config)
    pairs = pairs[: config.max_problems]
    rows = [_messages(problem, config, index) for index, (problem, _) in enumerate(pairs)]
    token_ids = tokenise(rows, tokenizer, config.path or f"reasoning-gym's {config.reasoning_gym}")
    prompts = [
        Prompt(id=f"{name}/{index}", token_ids=ids, text=messages[-1]["content"])
        for index, (messages, ids) in enumerate(zip(rows, token_ids, strict=True))
    ]
    if not all(prompt.token_ids for prompt in prompts):
        raise UserError("a problem is empty")
    return Task(name, config, prompts, [answer for _, answer in pairs])


def _generator(config: TaskConfig) -> dict[str, Any]:
    if config.reasoning_gym is None:
        return {}
    return {"name": config.reasoning_gym, "size": config.size, "seed": config.seed, "options": config.options}


def _generated(config: TaskConfig, grader: Grader) -> list[tuple[Any, str]]:
    if find_spec("reasoning_gym") is None:
        raise UserError("reasoning_gym is not installed: pip install 'megatron-opd[tasks]'")
    return list(grader.problems(_generator(config)))


def _from_files(config: TaskConfig) -> list[tuple[Any, str]]:
    assert config.path is not None
    rows = read_records(config.path, config.split)
    try:
        prompt = column_of(rows, config.prompt_column, PROMPT_COLUMNS, "problem")
        answer = column_of(rows, config.answer_column, ANSWER_COLUMNS, "answer")
    except UserError as error:
        raise UserError(f"{config.path}: {error}: name it with prompt_column or answer_column") from None
    pairs = []
    for number, row in enumerate(rows, start=1):
        problem, expected = value_of(row, prompt), value_of(row, answer)
        if not isinstance(problem, str | list) or not problem:
            raise UserError(f"{config.path}, row {number}: {prompt} is neither text nor chat messages")
        if (
            isinstance(expected, bool)
            or not isinstance(expected, str | int | float)
            or not str(expected).strip()
        ):
            raise UserError(f"{config.path}, row {number}: {answer} is neither text nor a number")
        pairs.append((problem, expected_answer(str(expected))))
    return pairs


def _messages(problem: Any, config: TaskConfig, row: int) -> list[Message]:
    """The chat that ends with the problem in its template; a problem that is a chat brings the messages before it."""
    messages = chat_messages(problem, f"problem {row}", config.system_prompt)
    last = messages[-1]
    assert isinstance(last, Mapping)
    return [*messages[:-1], {**last, "content": config.template.replace("{problem}", last["content"])}]
