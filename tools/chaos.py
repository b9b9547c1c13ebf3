"""Kills processes of a small run, over and over, and checks that what survives is what an undisturbed run gives.

Usage: python -m tools.chaos FOLDER [--kills N] [--engine local|sglang] [--processes N] [--seed N] [--report FILE]

Random processes (the launcher, a rank, a writer of a checkpoint, a server) get a `kill -9` at random moments of a run
of tiny models, and the same command is given again; after a few kills it may come to its end, and another run begins,
until there were as many kills as were asked for. In each of them

- nothing of a killed run is left when it is started again;
- metrics, TensorBoard and ledger have every step once, and every prompt is consumed when it is due, once;
- with the local engine metrics, ledger and final weights are bit for bit those of the run that nobody disturbed.

SGLang is found through MEGATRON_OPD_SGLANG, the path of its interpreter. Exit code 1 when something does not hold.
"""

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_opd.checkpoint.published import published, step_of
from megatron_opd.data.prompts import PromptStream, load_prompts
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.report.ledger import LEDGER_FILE
from megatron_opd.report.metrics import read_metrics
from megatron_opd.report.step_lines import read_steps
from tests.data.tiny_tokenizer import save_tokenizer, write_prompts
from tests.tiny import save_tiny_model

PROMPTS, SAMPLES, PROMPT_TOKENS = 4, 2, 32  # of a step; tokens at most
KILLS_OF_A_RUN = 5  # at most: where it is slower than the undisturbed one, none would let it complete
IN_START_UP = 0.25  # share of the kills
DEADLY = (
    "launcher",
    "rank",
)  # no run goes on without; one may go on without a server, or until its save is due
END_WITHIN = 120.0  # seconds in which what a killed run has started has to be gone
TIMINGS = ("_seconds", "/seconds")
logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every step that was purged


@dataclass
class Kill:
    """One `kill -9`, and what came of it."""

    victim: str
    seconds: float  # since the command was given
    step: int  # the last one recorded
    phase: str  # "start", "save" (one was being written) or "step"
    survived: bool = True  # the run went on by itself; else:
    newest: int = 0  # the newest complete checkpoint that it left
    left: int = 0  # processes that had to be ended by hand
    said: str = ""  # why the run ended, in its own words


@dataclass
class Run:
    """A run that was killed, and started again, until it was complete."""

    kills: list[Kill] = field(default_factory=list)
    lives: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    """Make the models, run once undisturbed and then disturbed, report; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where models and runs are put; must not exist")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--engine", choices=("local", "sglang"), default="local")
    parser.add_argument("--processes", type=int, default=2, help="data-parallel ranks")
    parser.add_argument("--steps", type=int, default=16, help="of a run")
    parser.add_argument("--seed", type=int, default=0, help="of victims and moments")
    parser.add_argument("--report", type=Path, help="JSON file with every kill")
    chosen = parser.parse_args(arguments)
    chosen.folder.mkdir(parents=True)
    inputs = make_inputs(chosen.folder / "inputs")
    console, rng = Console(highlight=False, soft_wrap=True), random.Random(chosen.seed)

    whole = Chaos(inputs, chosen, "undisturbed", rng, console)
    life = whole.live(kills=0)
    if life.wrong:
        console.print(f"the undisturbed run failed: {life.wrong[0]}")
        return 1
    runs: list[Run] = []
    while (left := chosen.kills - sum(len(run.kills) for run in runs)) > 0:
        chaos = Chaos(inputs, chosen, f"run{len(runs)}", rng, console, whole.pace)
        run = chaos.live(min(left, KILLS_OF_A_RUN))
        exact = chosen.engine == "local"
        run.wrong = run.wrong or check(inputs, chaos.run_dir, chosen.steps, whole.run_dir, exact=exact)
        runs.append(run)
        if chosen.report is not None:
            write_report(chosen.report, chosen, life, runs)
        if run.wrong:
            break
    report(console, runs)
    return int(any(run.wrong for run in runs))


def make_inputs(folder: Path) -> Path:
    """Student, teacher and prompts."""
    folder.mkdir()
    save_tiny_model(folder / "student", seed=1, tied=False)
    save_tiny_model(folder / "teacher", seed=2, layers=6, hidden=96, tied=False)
    for name in ("student", "teacher"):
        save_tokenizer(folder / name)
    write_prompts(folder / "prompts.jsonl", 37)  # no multiple of those of a step: epochs end within steps
    return folder


def write_config(inputs: Path, chosen: argparse.Namespace, name: str) -> Path:
    """The configuration of a run, which saves at every second step."""
    rollout: dict[str, Any] = {
        "prompts_per_step": PROMPTS,
        "samples_per_prompt": SAMPLES,
        "max_new_tokens": 12,
    }
    if chosen.engine == "sglang":
        served = {"python": os.environ["MEGATRON_OPD_SGLANG"], "concurrency": 8}
        rollout |= {"engine": "sglang", "max_staleness": 1, "sglang": served}
    config = {
        "run_dir": str(chosen.folder / name),
        "precision": "fp32",
        "student": {"path": str(inputs / "student")},
        "teacher": {"path": str(inputs / "teacher")},
        "parallel": {"data": chosen.processes},
        "data": {"prompts": str(inputs / "prompts.jsonl"), "max_prompt_tokens": PROMPT_TOKENS},
        "rollout": rollout,
        "objective": {"preset": "opd" if chosen.engine == "sglang" else "iw-opd-exact"},
        "optimizer": {"lr": 3e-3},
        "training": {"steps": chosen.steps, "microbatch_tokens": 256},
        "checkpoint": {"save_every": 2},
    }
    path = chosen.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Chaos:
    """A run called `name` and the one who kills its processes. `pace`: seconds until the loop, and of a step."""

    def __init__(
        self,
        inputs: Path,
        chosen: argparse.Namespace,
        name: str,
        rng: random.Random,
        console: Console,
        pace: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        self.run_dir, self.pace = chosen.folder / name, pace
        self._config, self._steps = write_config(inputs, chosen, name), chosen.steps
        self._rng, self._console = rng, console
        self._log = self.run_dir.with_suffix(".log")  # of one life
        self._others: list[psutil.Process] = []  # that the launcher had started when one was killed last

    def live(self, kills: int) -> Run:
        """Start the run until it is complete, with at most so many kills."""
        run, began = Run(), time.monotonic()
        code = -1
        while code and not run.wrong:
            run.lives += 1
            started, mine = time.monotonic(), len(run.kills)
            with self._log.open("w") as log:
                launcher = subprocess.Popen(self._command(), stdout=log, stderr=log, env=_environment())
            while len(run.kills) < kills and self._wait(launcher):
                run.kills += self._kill(launcher, started)
                if run.kills[mine:] and run.kills[-1].victim in DEADLY:
                    break
            if not kills:
                self._time(launcher, started)
            code = launcher.wait()
            if code and not run.kills[mine:]:
                run.wrong.append(f"life {run.lives} ended with exit code {code}: {self._said()[-300:]}")
            elif code:
                self._bury(run.kills[-1])
                run.wrong += ["processes were left behind"] if run.kills[-1].left else []
            for kill in run.kills[mine:]:
                self._console.print(f"{self.run_dir.name}, life {run.lives}: {kill}")
        run.seconds = time.monotonic() - began
        return run

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "megatron_opd.cli", "launch", "local", str(self._config)]

    def _said(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def _in_loop(self) -> bool:
        return any(word in self._said() for word in ("starting: ", "resuming at step"))

    def _time(self, launcher: subprocess.Popen[bytes], started: float) -> None:
        """Let a run go to its end undisturbed, and remember its pace."""
        while launcher.poll() is None and not self._in_loop:
            time.sleep(0.05)
        begun = time.monotonic()
        launcher.wait()
        self.pace = begun - started, (time.monotonic() - begun) / self._steps

    def _wait(self, launcher: subprocess.Popen[bytes]) -> bool:
        """Until a random moment of this life; False when it ends before."""
        in_start_up = self._rng.random() < IN_START_UP
        seconds, part = self._rng.random() * self.pace[0 if in_start_up else 1], self._rng.random()
        while not in_start_up and not self._in_loop and launcher.poll() is None:
            time.sleep(0.05)
        begun = self._step()
        step = 0 if in_start_up else begun + int(part * (self._steps - begun))
        while self._step() < step and launcher.poll() is None:
            time.sleep(0.01)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and launcher.poll() is None:
            time.sleep(0.005)
        return launcher.poll() is None

    def _kill(self, launcher: subprocess.Popen[bytes], started: float) -> list[Kill]:
        """Kill one process of the run, each kind as likely; [] when it ended by itself just before."""
        kinds: dict[str, list[psutil.Process]] = {}
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(launcher.pid)
            self._others = first.children(recursive=True)
            for process in [first, *self._others]:
                with suppress(psutil.NoSuchProcess):  # writers come and go
                    kinds.setdefault(kind_of(process, launcher.pid), []).append(process)
        kinds.pop("other", None)
        if not kinds:
            return []
        victim = self._rng.choice(sorted(kinds))
        writing = any((self.run_dir / "checkpoints").glob(".writing_step_*"))
        phase = "save" if writing else "step" if self._in_loop else "start"
        kill = Kill(victim, time.monotonic() - started, self._step(), phase)
        with suppress(psutil.NoSuchProcess):
            self._rng.choice(kinds[victim]).kill()
            return [kill]
        return []

    def _bury(self, kill: Kill) -> None:
        """What the run that this kill has ended leaves: a checkpoint, a last word, and no process."""
        kill.survived = False
        left = psutil.wait_procs(self._others, timeout=END_WITHIN)[1]
        kill.left = len(left)
        for process in left:
            process.kill()
        kill.newest = max(map(step_of, published(self.run_dir / "checkpoints")), default=0)
        kill.said = next((line for line in self._said().splitlines() if line.startswith("error: ")), "")

    def _step(self) -> int:
        rows = read_metrics(self.run_dir)
        return int(rows[-1]["step"]) if rows else 0


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def kind_of(process: psutil.Process, launcher: int) -> str:
    """What a process of a run is."""
    words = " ".join(process.cmdline())
    if process.pid == launcher:
        return "launcher"
    if "megatron_opd.cli train" in words:
        return "rank" if process.ppid() == launcher else "writer"
    return "server" if "sglang" in words else "other"


def check(inputs: Path, run_dir: Path, steps: int, undisturbed: Path, *, exact: bool) -> list[str]:
    """What is wrong with a run that has come to its end, in words. `exact`: it has to be the undisturbed one."""
    wrong, every = [], list(range(1, steps + 1))
    rows, ledger = read_metrics(run_dir), read_steps(run_dir / LEDGER_FILE)
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    steps_of = {
        "metrics.jsonl": [row["step"] for row in rows],
        "the ledger": [row["step"] for row in ledger],
        "TensorBoard": [event.step for event in board.Scalars("train/loss")],
    }
    wrong += [f"{name} has the steps {found}" for name, found in steps_of.items() if found != every]
    prompts = load_prompts(
        inputs / "prompts.jsonl", load_tokenizer(inputs / "student"), max_prompt_tokens=PROMPT_TOKENS
    )
    stream = PromptStream(prompts.prompts, seed=0)
    for row in ledger:
        due = [(prompt.id, sample) for prompt in stream.take(PROMPTS) for sample in range(SAMPLES)]
        if [(each["prompt"], each["sample"]) for each in row["rollouts"]] != due:
            wrong.append(f"step {row['step']} consumed other rollouts than those that were due")
    if exact:
        if _untimed(rows) != _untimed(read_metrics(undisturbed)):
            wrong.append("metrics differ from the undisturbed run's")
        if ledger != read_steps(undisturbed / LEDGER_FILE):
            wrong.append("the ledger differs from the undisturbed run's")
        weights, expected = (load_file(each / "hf" / "model.safetensors") for each in (run_dir, undisturbed))
        differing = [name for name in expected if not torch.equal(weights[name], expected[name])]
        wrong += [f"final weights differ: {', '.join(differing)}"] if differing else []
    return wrong


def _untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.endswith(TIMINGS)} for row in rows]


def write_report(path: Path, chosen: argparse.Namespace, undisturbed: Run, runs: list[Run]) -> None:
    """Everything so far, as JSON."""
    settings = {key: value for key, value in vars(chosen).items() if key not in ("folder", "report")}
    kills = sum(len(run.kills) for run in runs)
    result = {"settings": settings, "kills": kills, "wrong": [line for run in runs for line in run.wrong]}
    result |= {"undisturbed_seconds": undisturbed.seconds, "runs": [asdict(run) for run in runs]}
    path.write_text(json.dumps(result, indent=1) + "\n")


def report(console: Console, runs: list[Run]) -> None:
    """A table of the kills, and what is wrong, if anything is."""
    kills = [kill for run in runs for kill in run.kills]
    table = Table("killed", "in start-up", "in a step", "in a save", "steps done again", "run went on")
    for victim in sorted({kill.victim for kill in kills}):
        mine = [kill for kill in kills if kill.victim == victim]
        phases = Counter(kill.phase for kill in mine)
        lost = [kill.step - kill.newest for kill in mine if not kill.survived]
        again = f"{sum(lost) / len(lost):.1f}, at most {max(lost)}" if lost else "none"
        counts = [str(phases[phase]) for phase in ("start", "step", "save")]
        table.add_row(victim, *counts, again, str(sum(kill.survived for kill in mine)))
    console.print(table)
    lives, seconds = sum(run.lives for run in runs), sum(run.seconds for run in runs)
    console.print(f"{len(kills)} kills, {len(runs)} runs, {lives} lives, {seconds:.0f} s")
    for number, run in enumerate(runs):
        for line in run.wrong:
            console.print(f"WRONG: run{number}: {line}")
    if not any(run.wrong for run in runs):
        console.print("every run resumed after every kill, and ended as it had to")


if __name__ == "__main__":
    sys.exit(main())
