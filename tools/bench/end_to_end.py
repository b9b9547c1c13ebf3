"""Our training and TRL's in one run: tokens a second of whole steps, peak memory, held-out reverse KL reached.

Usage: python -m tools.bench.end_to_end [--precision fp32|bf16] [--steps N] [KEY=VALUE ...]

Models and prompts are the quickstart's (made where they are missing), and so are its batch and lengths; KEY=VALUE
changes its configuration. Both sides start from the same Hugging Face folders, read the same prompts in the same order,
draw at the same temperature, minimise the mean exact reverse KL over the vocabulary and update with AdamW at the same
constant rate. In bf16 both teachers have bf16 weights and both students float32 master weights, of which ours computes
with a bf16 copy and TRL's under autocast.

TRL runs in an environment of its own (`make .venv-trl/.installed`). The two take their steps in turns on the CPU, each
with all threads while the other waits, so that drift of the machine meets both. The first step does not count for the
speed. Afterwards one program of ours, in float32 and with the same noise, measures the students as they were and as
each side has saved them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_opd.checkpoint.hf_export import save_hf
from megatron_opd.config.load import load_config
from megatron_opd.config.schema import Config
from megatron_opd.data.prompts import load_prompts
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.errors import UserError
from megatron_opd.models.gpt import DTYPES
from megatron_opd.report.run_log import RunLog
from megatron_opd.train import train_step
from megatron_opd.training.evaluating import evaluate_heldout
from megatron_opd.training.job import set_up
from tools.bench.measure import median_ratio
from tools.bench.turns import Peer, Step, Stopwatch
from tools.quickstart import CONFIG, STUDENT_HF, TEACHER_HF, prepare

TRL = Path(".venv-trl/bin/python")
SETTINGS = {
    "student.path": STUDENT_HF,
    "teacher.path": TEACHER_HF,
    "data.shuffle": False,
    "objective.token_weight.kind": "uniform",
    "optimizer.lr": 2e-4,
    "optimizer.warmup_steps": 0,
    "optimizer.schedule": "constant",
}


@dataclass(frozen=True)
class Run:
    """A side's steps, and the held-out reverse KL of the student that it has saved, nats per token."""

    steps: list[Step]
    reverse_kl: float


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.end_to_end", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    try:
        if options.steps < 2:
            raise UserError("--steps: 2 or more, for the first does not count")
        if not TRL.is_file():
            raise UserError(f"{TRL} is not there: run `make .venv-trl/.installed`")
        with tempfile.TemporaryDirectory() as folder:
            print_figures(*compare(options.precision, options.steps, options.overrides, Path(folder)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def compare(
    precision: str, steps: int, given: Sequence[str], folder: Path
) -> tuple[str, float, dict[str, Run]]:
    """(title, held-out reverse KL at the start, the runs of both sides)."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    prepare(Console())
    fixed = {**SETTINGS, "run_dir": folder / "run", "precision": precision, "training.steps": steps}
    overrides = [*(f"{key}={value}" for key, value in fixed.items()), *given]
    prompts = folder / "prompts.jsonl"
    write_prompts(load_config(CONFIG, overrides), prompts)
    config = load_config(CONFIG, [*overrides, f"data.prompts={prompts}"])
    exports = {name: folder / name for name in ("ours", "TRL")}
    turns = take_turns(config, folder, exports)
    start, *reached = (
        heldout_reverse_kl(config, student, folder / f"heldout-{number}")
        for number, student in enumerate((config.student.path, *exports.values()))
    )
    runs = {name: Run(turns[name], value) for name, value in zip(exports, reached, strict=True)}
    rollout = config.rollout
    size = f"{rollout.prompts_per_step} × {rollout.max_new_tokens} tokens a step, {steps} steps"
    return f"{precision}, {size}, {os.cpu_count()} CPUs", start, runs


def write_prompts(config: Config, path: Path) -> None:
    """The prompts of all steps in the order of their file, without those that are too long, as chat messages."""
    tokenizer = load_tokenizer(config.student.path)
    loaded = load_prompts(config.data.prompts, tokenizer, max_prompt_tokens=config.data.max_prompt_tokens)
    wanted = config.rollout.prompts_per_step * config.training.steps
    if len(loaded.prompts) < wanted:
        raise UserError(
            f"data.prompts: {len(loaded.prompts)} prompts, {wanted} are needed: take fewer --steps"
        )
    messages = ([{"role": "user", "content": prompt.text}] for prompt in loaded.prompts[:wanted])
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in messages))


def trl_settings(config: Config, folder: Path, export: Path) -> dict[str, Any]:
    """The same training in TRL's words."""
    optimizer, rollout = config.optimizer, config.rollout
    return {
        "student": str(config.student.path),
        "teacher": str(config.teacher.path),
        "prompts": str(config.data.prompts),
        "export": str(export),
        "trainer": {
            "output_dir": str(folder / "trl"),
            "bf16": config.precision == "bf16",
            "teacher_model_init_kwargs": {"dtype": str(DTYPES[config.precision]).removeprefix("torch.")},
            "max_steps": config.training.steps,
            "per_device_train_batch_size": rollout.prompts_per_step,
            "max_completion_length": rollout.max_new_tokens,
            "temperature": rollout.temperature,
            "learning_rate": optimizer.lr,
            "lr_scheduler_type": "constant",
            "adam_beta1": optimizer.beta1,
            "adam_beta2": optimizer.beta2,
            "adam_epsilon": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
            "max_grad_norm": optimizer.clip_grad,
            "seed": config.seed,
        },
    }


def take_turns(config: Config, folder: Path, exports: dict[str, Path]) -> dict[str, list[Step]]:
    """Both trainings, a step of each in turn; their students lie in `exports` afterwards."""
    settings = folder / "settings.json"
    settings.write_text(json.dumps(trl_settings(config, folder, exports["TRL"])))
    command = [str(TRL), "-m", "tools.bench.trl_steps", str(settings)]
    taken: dict[str, list[Step]] = {name: [] for name in exports}
    with Peer(command, folder / "trl.log", {"HF_HUB_OFFLINE": "1"}) as trl:
        trl.ready()
        ours = OurSteps(config)
        with ours.log:
            for number in range(1, config.training.steps + 1):
                taken["ours"].append(ours.step(number))
                taken["TRL"].append(trl.step())
                read = {name: steps[-1].prompt_tokens for name, steps in taken.items()}
                if len(set(read.values())) > 1:
                    raise SystemExit(f"the sides have read other prompts: {read} tokens in step {number}")
                print(progress(number, {name: steps[-1] for name, steps in taken.items()}), flush=True)
        ours.finish(exports["ours"])
        trl.finish()
    return taken


class OurSteps:
    """Our training, a step at a time: what `train` does between two checkpoints. Steps are taken inside `log`."""

    def __init__(self, config: Config) -> None:
        self._job = set_up(config)
        decode, steps = self._job.texts.tokenizer.decode, config.training.steps
        self.log = RunLog(config.run_dir, start=0, steps=steps, enabled=True, decode=decode)

    def step(self, number: int) -> Step:
        """Take step `number`, counted from 1, and write its metrics and samples."""
        watch = Stopwatch()
        metrics, rollouts, diagnostics = train_step(self._job, number)
        self.log.record(number, metrics, rollouts, diagnostics)
        prompt, response = (
            sum(len(getattr(rollout, name)) for rollout in rollouts)
            for name in ("prompt_ids", "response_ids")
        )
        return watch.step(prompt, response)

    def finish(self, export: Path) -> None:
        """Save the student as a Hugging Face folder."""
        job = self._job
        save_hf(job.student.chunks, job.architecture, job.groups, job.config.student.path, export)


def heldout_reverse_kl(config: Config, student: Path, run_dir: Path) -> float:
    """Of a student in a Hugging Face folder, in float32, nats per token on its own responses."""
    gc.collect()
    measured = config.student.model_copy(update={"path": student})
    changed = {"precision": "fp32", "student": measured, "run_dir": run_dir}
    return evaluate_heldout(set_up(config.model_copy(update=changed)), 0)["eval/reverse_kl"]


def progress(number: int, sides: dict[str, Step]) -> str:
    """A line on a round."""
    said = [
        f"{name} {step.seconds:.2f} s ({step.cpu_seconds:.2f} s of CPU) for {step.response_tokens} tokens"
        for name, step in sides.items()
    ]
    return f"step {number}: {', '.join(said)}"


def print_figures(title: str, start: float, runs: dict[str, Run]) -> None:
    """A line a side, and how many times TRL's tokens a second are ours."""
    table = Table("", "step, s", "CPU s", "tokens/s", "peak GiB", "reverse KL", "after", title=title)
    speeds, cpu = {}, {}
    for name, run in runs.items():
        counted = run.steps[1:]
        speeds[name] = [step.speed for step in counted]
        cpu[name] = [step.cpu_seconds / step.response_tokens for step in counted]
        table.add_row(
            name,
            f"{statistics.median(step.seconds for step in counted):.2f}",
            f"{statistics.median(step.cpu_seconds for step in counted):.2f}",
            f"{statistics.median(speeds[name]):.0f}",
            f"{run.steps[-1].peak_bytes / 2**30:.2f}",
            f"{start:.3f}",
            f"{run.reverse_kl:.3f}",
        )
    Console().print(table)
    print(f"tokens/s, ours / TRL = {median_ratio(speeds['ours'], speeds['TRL']):.2f} (median of rounds)")
    print(f"CPU seconds a token, TRL / ours = {median_ratio(cpu['TRL'], cpu['ours']):.2f}")


if __name__ == "__main__":
    sys.exit(main())
