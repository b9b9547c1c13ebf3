"""A model by itself on a run's tasks: what `megatron-opd evaluate` does in every process."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from megatron_opd.config.checks import check_fields
from megatron_opd.config.layout_checks import check_divisible, check_experts, data_parallel_size
from megatron_opd.config.schema import Config
from megatron_opd.data.tokenizer import load_tokenizer, stop_ids
from megatron_opd.errors import UserError
from megatron_opd.evaluation.evaluate import as_json
from megatron_opd.evaluation.scores import TaskScores
from megatron_opd.evaluation.tasks import Task, read_tasks
from megatron_opd.models.architecture import Architecture, read_architecture
from megatron_opd.models.gpt import GPT
from megatron_opd.parallel import cpu
from megatron_opd.parallel.groups import ParallelLayout, build_groups
from megatron_opd.rollout.local import LocalEngine
from megatron_opd.rollout.sglang import SGLangEngine
from megatron_opd.rollout.sharded import RolloutEngine
from megatron_opd.training.evaluating import task_scores
from megatron_opd.training.job import init_distributed
from megatron_opd.training.models import load_gpt
from megatron_opd.training.relay import layout_of
from megatron_opd.training.serving import serving
from megatron_opd.watch.phases import SYNC, Phases
from megatron_opd.watch.watchdog import Watchdog

RESULTS = "results.json"


@dataclass(frozen=True)
class EvaluatedTexts:
    """Tokenizer and tasks of an evaluated model."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    stop_ids: tuple[int, ...]
    tasks: list[Task]


@dataclass(frozen=True)
class EvaluatedChunks:
    """This rank's part of an evaluated model."""

    chunks: Sequence[GPT]


@dataclass(frozen=True)
class Evaluated:
    """An evaluated model as this rank has it; servers are given its weights as a student's."""

    config: Config
    architecture: Architecture
    groups: ProcessGroupCollection
    device: torch.device
    student: EvaluatedChunks
    texts: EvaluatedTexts
    engine: RolloutEngine
    phases: Phases


def model_of(config: Config, given: Path | None) -> Path:
    """The folder that is evaluated: the `given` one, else the newest checkpoint of the run. Raises UserError."""
    if given is not None:
        if not given.is_dir():
            raise UserError(f"--model: {given} is no folder")
        return given.resolve()
    latest = config.run_dir / "checkpoints" / "latest"
    if not latest.is_dir():
        raise UserError(f"{config.run_dir} has no checkpoint yet: name a model folder with --model")
    return latest.resolve()


def default_output(config: Config, model: Path) -> Path:
    """Where the results of a model go unless told otherwise."""
    return config.run_dir / "evaluate" / model.name


def check_evaluation(config: Config, model: Path, processes: int) -> tuple[Architecture, ParallelLayout]:
    """The model, and its layout on so many processes. Raises UserError where these do not fit, or without tasks."""
    check_fields(config)
    if not config.evaluation.tasks:
        raise UserError(
            "evaluation.tasks: there are none: give some, such as evaluation.tasks.aime24.path=..."
        )
    for name, task in config.evaluation.tasks.items():
        if task.path is not None and not task.path.exists():
            raise UserError(f"evaluation.tasks.{name}.path: {task.path} does not exist")
    arch = read_architecture(model)
    data = data_parallel_size(config.parallel, processes)
    check_divisible("parallel", config.parallel, {"model": arch})
    check_experts("parallel", config.parallel, {"model": arch}, data)
    return arch, layout_of(config.parallel.model_copy(update={"data": data}))


def evaluate_model(
    config: Config, model: Path, output: Path, *, quiet: bool = False
) -> dict[str, TaskScores]:
    """Evaluate a model folder of any kind; samples, and results.json at the end, are written to `output`.

    Unless `quiet`, what servers do is told. Returns the scores by task on rank 0, {} elsewhere. Collective: every
    started rank calls it. Raises UserError.
    """
    arch, layout = check_evaluation(config, model, int(os.environ.get("WORLD_SIZE", "1")))
    tokenizer = load_tokenizer(model)
    if len(tokenizer) > arch.vocab_size:
        raise UserError(
            f"{model}: its tokenizer has {len(tokenizer)} tokens, the model only {arch.vocab_size}: use its own"
        )
    tasks = read_tasks(config, tokenizer, arch.max_positions)
    texts = EvaluatedTexts(tokenizer, arch.vocab_size, stop_ids(model, tokenizer), tasks)
    cpu.install()
    device = init_distributed(config.timeouts.collective)
    evaluated = load(config, model, output, arch, layout, texts, device)
    scores = scores_on_rank_0(evaluated, _say if not quiet and dist.get_rank() == 0 else _silent)
    if scores:
        found = {"model": str(model), "tasks": as_json(scores)}
        (output / RESULTS).write_text(json.dumps(found, indent=1) + "\n")
    dist.destroy_process_group()
    return scores


def load(
    config: Config,
    model: Path,
    output: Path,
    arch: Architecture,
    layout: ParallelLayout,
    texts: EvaluatedTexts,
    device: torch.device,
) -> Evaluated:
    """The model with its weights. Collective over WORLD, which the layout fills."""
    # Servers have their logs in the run directory, and the files beside exported weights are the student's.
    student = config.student.model_copy(update={"path": model})
    config = config.model_copy(update={"run_dir": output, "student": student})
    groups = build_groups(layout, timeout=config.timeouts.collective)
    padded = arch.padded_vocab_size(layout.tensor)
    chunks = load_gpt(arch, model, layout, groups, config.precision, padded, device)
    for chunk in chunks:
        chunk.eval()
    engine = engine_of(config, chunks, arch, groups)
    return Evaluated(config, arch, groups, device, EvaluatedChunks(chunks), texts, engine, Phases())


def engine_of(
    config: Config, chunks: Sequence[GPT], arch: Architecture, groups: ProcessGroupCollection
) -> RolloutEngine:
    """What draws the responses, as in training."""
    if config.rollout.engine == "sglang":
        return SGLangEngine(arch.vocab_size, groups.mp)
    return LocalEngine(chunks, arch, groups, max_batch=config.rollout.max_batch)


def scores_on_rank_0(evaluated: Evaluated, say: Callable[[str], None]) -> dict[str, TaskScores]:
    """The scores by task on rank 0, {} elsewhere; `say` is told what servers do. Collective over the model's ranks."""
    config, phases = evaluated.config, evaluated.phases
    with Watchdog(phases, config.timeouts.limits, config.run_dir), serving(evaluated, say) as publish:
        with phases(SYNC):
            publish(0)
        return task_scores(evaluated, 0, publish, config.run_dir)


def _say(line: str) -> None:
    print(line, flush=True)


def _silent(line: str) -> None:
    del line


def print_scores(scores: Mapping[str, TaskScores]) -> None:
    """A line for every metric of every task, with its interval."""
    table = Table("task", "problems", "metric", "%", "95 % interval", "tokens", "cut off", "no answer")
    for name, task in scores.items():
        rest = (f"{task.tokens:.0f}", f"{task.truncated:.1%}", f"{task.unanswered:.1%}")
        for number, (metric, found) in enumerate(task.metrics.items()):
            head = (name, str(task.problems)) if number == 0 else ("", "")
            interval = f"{100 * found.low:.1f} to {100 * found.high:.1f}"
            table.add_row(
                *head, metric, f"{100 * found.mean:.1f}", interval, *(rest if number == 0 else ("",) * 3)
            )
    Console().print(table)
