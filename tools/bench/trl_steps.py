"""TRL's side of `tools.bench.end_to_end`: its DistillationTrainer, run by the interpreter of `.venv-trl`.

    .venv-trl/bin/python -m tools.bench.trl_steps SETTINGS.json

The trainer as it comes, with its own generation, loss and optimizer; only gradient checkpointing, which costs time, is
off. With beta 1 its loss is the exact reverse KL over the vocabulary, a mean over all response tokens of the step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from tools.bench.turns import Turns


class InTurns(TrainerCallback):
    """Begins a step when it is asked for; one lasts until the trainer would begin the next."""

    def __init__(self, turns: Turns, batch: int) -> None:
        self._turns, self._batch = turns, batch
        self._seen, self._counts = 0, (0, 0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Answer for the step before and wait for the next one's turn."""
        if state.global_step == 0:
            self._turns.say({})
        else:
            self._turns.took(*self._counts)
        self._turns.wait()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Read the step's tokens off its log."""
        if "completions/mean_length" not in logs:
            return
        response = round(logs["completions/mean_length"] * self._batch)
        self._counts = (round(logs["num_tokens"]) - self._seen - response, response)
        self._seen = round(logs["num_tokens"])

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Answer for the last step."""
        self._turns.took(*self._counts)


def main(settings: dict[str, Any]) -> None:
    """Train in turns and save the student."""
    turns = Turns()
    rows = [json.loads(line) for line in Path(settings["prompts"]).read_text().splitlines()]
    trainer = DistillationTrainer(
        model=settings["student"],
        teacher_model=settings["teacher"],
        args=DistillationConfig(**settings["trainer"], **OF_THE_BENCH),
        train_dataset=Dataset.from_list(rows),
        callbacks=[InTurns(turns, settings["trainer"]["per_device_train_batch_size"])],
    )
    trainer.train()
    trainer.save_model(settings["export"])
    turns.say({})


OF_THE_BENCH: dict[str, Any] = {
    "beta": 1.0,
    "gradient_checkpointing": False,
    "shuffle_dataset": False,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}

if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
