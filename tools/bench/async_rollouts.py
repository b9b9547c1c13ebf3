"""Seconds of a step with rollouts drawn ahead, beside the same run without: one job, one set of servers, in turns.

    python -m tools.bench.async_rollouts [--staleness 1] [--steps 6] [--rounds 3] [--smoke] KEY=VALUE ...

KEY=VALUE are configuration keys: at least rollout.sglang.python or rollout.sglang.urls; without student.path small
random models are made. Every round has steps of both kinds, whose first, when nothing is on its way yet, does not
count; medians of the others. A synchronous step pays the pause of the servers too, some 10 ms, which a run of its own
would not.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_opd.config.load import load_config
from megatron_opd.rollout.stream import RolloutStream
from megatron_opd.train import train_step
from megatron_opd.training.job import Job, sampling_of, set_up
from megatron_opd.training.serving import Publish, serving

PHASES = ("rollout", "teacher", "train", "sync", "step")
DEFAULTS = {
    "precision": "fp32",
    "rollout.engine": "sglang",
    "rollout.prompts_per_step": 8,
    "rollout.max_new_tokens": 64,
    "data.max_prompt_tokens": 32,
    "objective.preset": "opd",
    "training.microbatch_tokens": 512,
}


def make_inputs(folder: Path) -> dict[str, Path]:
    """A student, a teacher of twice its layers, and prompts; random."""
    words = ["<unk>", "<s>", "</s>", *map(str, range(997))]
    tokenizer = Tokenizer(WordLevel({word: row for row, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    for name, layers in (("student", 4), ("teacher", 8)):
        torch.manual_seed(layers)
        config = LlamaConfig(
            vocab_size=len(words),
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        ).save_pretrained(folder / name)
    rows = (" ".join(str(row * k % 997) for k in range(1, 9 + row % 16)) for row in range(1, 65))
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "{row}"}}\n' for row in rows))
    return {
        "student.path": folder / "student",
        "teacher.path": folder / "teacher",
        "data.prompts": folder / "prompts.jsonl",
    }


def block(job: Job, publish: Publish, first: int, steps: int, staleness: int) -> list[list[float]]:
    """Seconds of each phase, and the mean staleness, of `steps` steps from `first` on; nothing is on its way after."""
    settings = job.config.rollout
    stream = RolloutStream(
        job.engine,
        job.prompts,
        sampling_of(job.config, job.texts, seed=0, samples=settings.samples_per_prompt),
        job.groups.dp_cp,
        prompts_per_step=settings.prompts_per_step,
        max_staleness=staleness,
        last=first + steps - 1,
    )
    job = replace(job, rollouts=stream)
    rows = []
    for step in range(first, first + steps):
        began = time.perf_counter()
        metrics, *_ = train_step(job, step, publish)
        sync = publish(step)
        parts = [metrics[f"{phase}_seconds"] for phase in PHASES[:3]]
        rows.append([*parts, sync, time.perf_counter() - began, metrics["staleness"]])
    return rows[1:]


def print_table(sides: dict[str, list[list[float]]]) -> None:
    """Medians by side, and the ratio of the steps."""
    table = Table("", *PHASES, "staleness", title="seconds of a step (rollout: what it waits for)")
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in sides.items()
    }
    for name, values in medians.items():
        table.add_row(name, *(f"{value:.3f}" for value in values))
    Console().print(table)
    synchronous, ahead = (values[4] for values in medians.values())
    print(f"synchronous / ahead = {synchronous / ahead:.2f}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.async_rollouts", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--staleness", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="one short round")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    rounds, steps = (1, 3) if options.smoke else (options.rounds, options.steps)
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values: dict[str, object] = {
            **DEFAULTS,
            "run_dir": folder / "run",
            "training.steps": 2 * rounds * steps,
        }
        if not any(each.startswith("student.path=") for each in options.overrides):
            values |= make_inputs(folder)
        (folder / "empty.yaml").write_text("{}\n")
        given = [*(f"{key}={value}" for key, value in values.items()), *options.overrides]
        job = set_up(load_config(folder / "empty.yaml", given))
        sides: dict[str, list[list[float]]] = {"synchronous": [], f"ahead by {options.staleness}": []}
        with serving(job, print) as publish:
            publish(0)
            first = 1
            for _ in range(rounds):
                for side, staleness in zip(sides, (0, options.staleness), strict=True):
                    sides[side] += block(job, publish, first, steps, staleness)
                    first += steps
        print_table(sides)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
