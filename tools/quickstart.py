"""Distils a small model from start to finish: what `make quickstart` runs.

Usage: python -m tools.quickstart [CONFIG.yaml] [KEY=VALUE ...]   (from the root of the repository)

Teacher: SmolLM2-135M-Instruct. Student: the same model with 6 of its 30 layers removed, which babbles.
Prompts: real questions. Everything that is already there is used again, so a second call goes on where the
first one stopped. Another CONFIG.yaml, such as that of examples/sglang-cpu, trains otherwise on the same inputs.
"""

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_opd.config.layout_checks import processes_of_run
from megatron_opd.config.load import load_config
from megatron_opd.config.schema import Config
from megatron_opd.errors import UserError
from megatron_opd.report.metrics import read_metrics
from tools import prune_layers, quickstart_data, smollm2

CONFIG = Path("examples/quickstart/config.yaml")
INPUTS = Path("runs/inputs")
TEACHER_HF = INPUTS / "smollm2-135m-instruct"
STUDENT_HF = INPUTS / "smollm2-24-layers"
PROMPTS = INPUTS / "prompts"
STUDENT_LAYERS, PRUNED_RANGE = 24, (8, 26)

QUESTION = "What is the difference between weather and climate?"
ANSWER_TOKENS = 60


def main(arguments: list[str]) -> int:
    """Prepare, train, summarise; returns the exit code."""
    console = Console(highlight=False, soft_wrap=True)
    given = arguments[:1] if arguments and arguments[0].endswith(".yaml") else []
    path, overrides = Path(*given) if given else CONFIG, arguments[len(given) :]
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file; run this from the root of the repository")
        config = load_config(path, overrides)
        prepare(console)
        already = finished(config)
        if already:
            console.print(f"{config.run_dir} is finished already; to start afresh: rm -r {config.run_dir}")
        else:
            several = processes_of_run(config) > 1
            start = ["launch", "local"] if several else ["train"]
            command = [sys.executable, "-m", "megatron_opd.cli", *start, "--", str(path), *overrides]
            code = subprocess.run(command, check=False).returncode
            if code != 0:
                return code
        summarise(config, console)
        if already:  # otherwise the training has just said so
            print_places(config, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from where it was", file=sys.stderr)
        return 130
    return 0


def prepare(console: Console) -> None:
    """Make the inputs that are missing under runs/inputs; each appears only when it is complete."""

    def make(target: Path, what: str, write: Callable[[], Any]) -> None:
        if target.exists():
            return
        began = time.monotonic()
        write()
        console.print(f"{what}: {target} ({time.monotonic() - began:.0f} s)")

    def prune() -> None:
        layers = prune_layers.read_config(TEACHER_HF)["num_hidden_layers"]
        dropped = prune_layers.evenly_spaced(layers, STUDENT_LAYERS, *PRUNED_RANGE)
        prune_layers.prune(TEACHER_HF, STUDENT_HF, dropped)

    make(PROMPTS, "prompts", lambda: quickstart_data.write_prompts(PROMPTS))
    make(TEACHER_HF, "teacher, Hugging Face", lambda: smollm2.write_smollm2(TEACHER_HF))
    make(STUDENT_HF, "student, Hugging Face", prune)
    for name, folder in (("teacher", TEACHER_HF), ("student", STUDENT_HF)):
        make(megatron_folder(folder), f"{name}, Megatron", partial(convert, folder))


def megatron_folder(hf_folder: Path) -> Path:
    """Where the converted form of a HF folder lies."""
    return hf_folder.with_name(hf_folder.name + "-megatron")


def convert(hf_folder: Path) -> None:
    """Convert a HF folder to the Megatron folder next to it."""
    with warnings.catch_warnings():
        # megatron-core says on import which optional GPU packages it lacks.
        warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
        from megatron_opd.checkpoint.convert import hf_to_megatron

        hf_to_megatron(hf_folder, megatron_folder(hf_folder))


def heldout_reverse_kl(config: Config) -> dict[int, float]:
    """Step -> held-out reverse KL in nats per token, from the run's metrics."""
    rows = read_metrics(config.run_dir)
    return {row["step"]: row["eval/reverse_kl"] for row in rows if row.get("eval/reverse_kl") is not None}


def finished(config: Config) -> bool:
    """Whether a run with these very settings reached its last step and exported its student after it."""
    saved, exported = config.run_dir / "config.yaml", config.run_dir / "hf" / "config.json"
    checkpoint = config.run_dir / "checkpoints" / "latest" / "run.json"
    if not all(path.is_file() for path in (saved, exported, checkpoint)):
        return False
    last_step = json.loads(checkpoint.read_text())["step"]
    newer = exported.stat().st_mtime >= checkpoint.stat().st_mtime
    return last_step == config.training.steps and newer and load_config(saved, []) == config


def summarise(config: Config, console: Console) -> None:
    """Print what the training changed: the held-out reverse KL, and the answers to one question."""
    curve = heldout_reverse_kl(config)
    if curve:
        first, last = min(curve), max(curve)
        console.print(
            f"\n[bold]Held-out reverse KL[/bold] (nats per token, on the student's own rollouts): "
            f"[bold]{curve[first]:.2f}[/bold] before, [bold]{curve[last]:.2f}[/bold] after {last} steps\n"
        )
    models = {"student before": STUDENT_HF, "student after": config.run_dir / "hf", "teacher": TEACHER_HF}
    answers = Table("", QUESTION, show_lines=True)
    for who, folder in models.items():
        answers.add_row(who, Text(answer(folder)))
    console.print(answers)


def print_places(config: Config, console: Console) -> None:
    """Print where everything lies."""
    places = (
        ("checkpoint", config.run_dir / "checkpoints" / "latest"),
        ("Hugging Face", config.run_dir / "hf"),
        ("metrics", config.run_dir / "metrics.jsonl"),
        ("curve", config.run_dir / "curve.png"),
        ("report", config.run_dir / "report.html"),
        ("TensorBoard", f"tensorboard --logdir {config.run_dir / 'tensorboard'}"),
    )
    for what, where in places:
        console.print(f"{what:<13} {where}", markup=False)


def answer(folder: Path) -> str:
    """The greedy answer of a HF folder to the question, drawn by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    messages = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
