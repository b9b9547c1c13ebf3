"""Seconds of one quickstart step, ours beside a plain transformers loop doing the same work in the same run.

Usage: python -m tools.bench.step [--precision fp32|bf16] [--steps N]   (uses what `make quickstart` has prepared)

Both sides draw 8 responses of 64 tokens, let the teacher score them, take the exact full-vocabulary reverse KL and
update with AdamW. The plain loop is what a user would write with transformers: padded batches, `generate`, logits at
every position, float32 weights (with autocast for bf16). The sides alternate; each phase's minimum counts.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from tools.quickstart import CONFIG, STUDENT_HF, TEACHER_HF

PHASES = ("rollout_seconds", "teacher_seconds", "train_seconds")


class PlainLoop:
    """On-policy distillation with transformers alone."""

    def __init__(self, prompts: Sequence[Sequence[int]], precision: str, new_tokens: int, lr: float) -> None:
        self.student = AutoModelForCausalLM.from_pretrained(str(STUDENT_HF), dtype=torch.float32)
        self.teacher = AutoModelForCausalLM.from_pretrained(str(TEACHER_HF), dtype=torch.float32).eval()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=lr, fused=True)
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        self.new_tokens = new_tokens
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self.prompts = torch.tensor(padded)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.mask = torch.arange(longest) >= longest - lengths[:, None]

    def step(self) -> dict[str, float]:
        """One update; seconds by phase."""
        began = time.perf_counter()
        with torch.no_grad(), self.autocast:
            tokens = self.student.generate(
                self.prompts,
                attention_mask=self.mask.long(),
                max_new_tokens=self.new_tokens,
                min_new_tokens=self.new_tokens,
                do_sample=True,
                pad_token_id=0,
            )
        drawn = time.perf_counter()
        mask = torch.cat([self.mask, torch.ones(len(tokens), self.new_tokens, dtype=torch.bool)], 1).long()
        with torch.no_grad(), self.autocast:
            teacher = self.teacher(tokens, attention_mask=mask).logits[:, -self.new_tokens - 1 : -1]
        scored = time.perf_counter()
        with self.autocast:
            student = self.student(tokens, attention_mask=mask).logits[:, -self.new_tokens - 1 : -1]
        student_logprobs, teacher_logprobs = (logits.float().log_softmax(-1) for logits in (student, teacher))
        loss = (student_logprobs.exp() * (student_logprobs - teacher_logprobs)).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        trained = time.perf_counter()
        return dict(zip(PHASES, (drawn - began, scored - drawn, trained - scored), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.step", description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\.")
    from megatron_opd.config.load import load_config
    from megatron_opd.train import train_step
    from megatron_opd.training.job import set_up

    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"run_dir={Path(folder) / 'run'}", f"precision={options.precision}"]
        config = load_config(CONFIG, overrides)
        job = set_up(config)
        rollout = config.rollout
        prompts = [prompt.token_ids for prompt in job.texts.training.prompts[: rollout.prompts_per_step]]
        plain = PlainLoop(prompts, options.precision, rollout.max_new_tokens, config.optimizer.lr)
        sides: dict[str, list[dict[str, float]]] = {"ours": [], "plain transformers": []}
        for step in range(1, options.steps + 1):
            sides["ours"].append(train_step(job, step)[0])
            sides["plain transformers"].append(plain.step())
    print_table(options.precision, sides)


def print_table(precision: str, sides: dict[str, list[dict[str, float]]]) -> None:
    """Minimum of every phase by side, their sums, and the ratio of the sums."""
    table = Table(
        "", *(phase.removesuffix("_seconds") for phase in PHASES), "step", title=f"seconds, {precision}"
    )
    totals = {}
    for name, rows in sides.items():
        best = [min(row[phase] for row in rows) for phase in PHASES]
        totals[name] = sum(best)
        table.add_row(name, *(f"{seconds:.2f}" for seconds in (*best, totals[name])))
    ours, plain = totals.values()
    Console().print(table)
    print(f"plain transformers / ours = {plain / ours:.2f}")


if __name__ == "__main__":
    main()
