"""Bytes sent and seconds of a step for every payload of a teacher, at several ratios of vocabulary to hidden size.

    python -m tools.bench.teacher_payloads [--python INTERPRETER] [--scale 4] [--rounds 3] [--json FILE]
    python -m tools.bench.teacher_payloads --student FOLDER --teacher FOLDER [--url http://127.0.0.1:30000] [--smoke]

Two processes of one thread: the student's, and that of a Megatron teacher on a rank of its own. With an interpreter
that has SGLang also a teacher behind a server (`--url` names one that serves the teacher already). Models are random,
the student half as wide as the teacher; `--scale` divides vocabulary and hidden sizes alike, so that the ratio stays.

A step is scoring, handing over, and the loss forward and backward, of all payloads in turns. Of the Megatron teacher it
is taken twice: "in turn" the student begins when all payloads are there, "together" it trains while the teacher scores
on. "hidden" is the part of the teacher's seconds for which the student does not wait together; with more processes at
work than cores it is less. What is sent is counted: the messages between the processes, or HTTP both ways.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from megatron_opd.models.architecture import read_architecture
from megatron_opd.teacher.payload import PayloadFormat
from tools.bench.measure import median_ratio
from tools.bench.payload_turns import WAYS, Found, K, Work, measure
from tools.bench.weight_sync import start_servers

SHAPES = {"SmolLM2-135M": (49152, 576), "Qwen3-0.6B": (151936, 1024), "Qwen3-8B": (151936, 4096)}
ALIKE = 1e-3  # of losses that are the same whoever is the teacher, relative


def save_models(folder: Path, vocab: int, hidden: int) -> tuple[Path, Path]:
    """A student and a teacher of `hidden`, twice the student's; random."""
    for name, width in (("student", hidden // 2), ("teacher", hidden)):
        config = Qwen3Config(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=4,
            num_attention_heads=2 * max(1, width // 128),
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=True,
        )
        torch.manual_seed(width)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
    return folder / "student", folder / "teacher"


def bytes_in_full(vocab: int, hidden: int) -> dict[str, int]:
    """Of a payload in bf16, a token, before any scaling."""
    return {
        way.name: PayloadFormat(way.kind, hidden, vocab, torch.bfloat16, k=K).bytes_per_position
        for way in WAYS
        if not way.served
    }


def in_two_processes(work: Work) -> dict[str, Found]:
    """`measure` in fresh processes. SystemExit when one of them fails; it has printed why."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        receiving, sending = context.Pipe(duplex=False)
        both = [
            context.Process(
                target=_process, args=(rank, f"file://{folder}/store", work, sending), daemon=True
            )
            for rank in range(2)
        ]
        for process in both:
            process.start()
        sending.close()
        try:
            found: dict[str, Found] = receiving.recv()
        except EOFError:
            raise SystemExit("a process of the bench has failed") from None
        finally:
            for process in both:
                process.join(10)
                process.kill()
    return found


def _process(rank: int, store: str, work: Work, sending: Any) -> None:
    if rank:
        sending.close()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found = measure(work)
    if found is not None:
        sending.send(found)
    dist.destroy_process_group()


def check_losses(found: dict[str, Found]) -> None:
    """SystemExit where payloads that say the same lead to other losses."""
    for one, other in (("hidden_states", "logits"), ("topk", "SGLang, topk"), ("sampled", "SGLang, sampled")):
        if other in found and abs(found[other].loss / found[one].loss - 1) > ALIKE:
            raise SystemExit(f"{other}: a loss of {found[other].loss:.6f}, of {one} {found[one].loss:.6f}")


def table_of(title: str, found: dict[str, Found], in_full: dict[str, int]) -> Table:
    """A line a payload; seconds are medians, ratios medians of rounds."""
    columns = ("", "B/token asked", "answered", "unscaled, bf16", "teacher s", "train s", "step s")
    table = Table(*columns, "x hidden_states", "together s", "waits s", "hidden", title=title)
    first = found["hidden_states"].step
    for name, each in found.items():
        seconds = (each.teacher, each.train, each.step)
        cells = [
            name,
            f"{each.asked:.1f}",
            f"{each.answered:.1f}",
            str(in_full.get(name, "")),
            *(f"{statistics.median(taken):.3f}" for taken in seconds),
            f"{median_ratio(each.step, first):.2f}",
        ]
        if each.together:
            cells += [f"{statistics.median(taken):.3f}" for taken in (each.together, each.waited)]
            cells.append(f"{each.hidden:.0%}")
        table.add_row(*cells)
    return table


def report(name: str, work: Work, found: dict[str, Found], scale: int) -> dict[str, Any]:
    """Print the table of one pair of models; the same as JSON."""
    check_losses(found)
    teacher = read_architecture(work.teacher)
    vocab, hidden = teacher.vocab_size, teacher.hidden_size
    title = f"{name}: {vocab} / {hidden} = {vocab / hidden:.0f}, fp32, {work.sequences} sequences, {work.rounds} rounds"
    Console(width=150).print(table_of(title, found, bytes_in_full(vocab * scale, hidden * scale)))
    return {"vocab": vocab, "hidden": hidden, **{way: asdict(each) for way, each in found.items()}}


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one pair of models and report it."""
    with ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory()))
        student, teacher, scale, url = options.student, options.teacher, 1, options.url
        if teacher is None:
            vocab, hidden = SHAPES[name]
            scale = options.scale
            student, teacher = save_models(folder, vocab // scale, hidden // scale)
        if options.python is not None:
            servers = start_servers(options.python, 1, teacher, "fp32", folder / "servers")
            ending.callback(servers.stop)
            (url,) = servers.urls
        work = Work(student, teacher, options.sequences, 32, 96, options.rounds, url)
        if options.smoke:
            work = replace(work, sequences=4, prompt=16, response=32, rounds=1)
        return report(name, work, in_two_processes(work), scale)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--python", type=Path, help="interpreter that has SGLang; its server is started")
    where.add_argument("--url", help="a server that serves --teacher already")
    parser.add_argument("--student", type=Path, help="Hugging Face folder")
    parser.add_argument("--teacher", type=Path, help="Hugging Face folder; instead of random models")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES], help="of random models")
    parser.add_argument("--scale", type=int, default=4, help="divides the sizes of random models")
    parser.add_argument("--sequences", type=int, default=8, help="of a step, 128 tokens each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where everything found is written")
    parser.add_argument("--smoke", action="store_true", help="one round of two microbatches")
    options = parser.parse_args(argv)
    if (options.teacher is None) != (options.student is None) or (options.url and options.teacher is None):
        parser.error("--student and --teacher go together, and --url needs them")
    os.environ["PYTHONWARNINGS"] = "ignore"  # megatron-core's as it is imported, once a process
    names = options.shapes if options.teacher is None else [options.teacher.name]
    found = {name: measured(name, options) for name in names}
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\.")
    main()
