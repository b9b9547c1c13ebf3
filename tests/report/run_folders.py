"""Run directories as a training leaves them, small, for tests of the report."""

import json
from pathlib import Path
from typing import Any

import yaml

STEPS = 12
RESPONSE = "a <b>bold</b> “naïve” 日本 token"  # tokens are the bytes of the text


def decode(ids: list[int]) -> str:
    """Tokens are bytes of UTF-8."""
    return bytes(ids).decode(errors="replace")


def profile(places: int, scale: float) -> dict[str, list[float | None]]:
    """A row's part of positions.jsonl; the last place has no token."""
    tokens = [8] * (places - 1) + [0]
    names = ("loss", "reverse_kl", "weight", "log_gap", "abs_log_gap", "student_logprob", "student_entropy")
    values: dict[str, Any] = {name: [scale * (i + 1) for i in range(places - 1)] + [None] for name in names}
    return {"tokens": tokens, **values}


def row(step: int, scale: float) -> dict[str, Any]:
    """A row of metrics.jsonl."""
    numbers: dict[str, Any] = {
        "loss": scale / step,
        "reverse_kl": 2 * scale / step,
        "grad_norm": 1.0,
        "tokens": 64,
    }
    numbers |= {"lr": 1e-3, "truncated": 0.25, "response_tokens": 16.0, "skipped": 0, "student_entropy": 1.5}
    return {"step": step, **numbers, "rollout_seconds": 1.5, "train_seconds": 0.5, "new_metric": 3.0}


def write_run(folder: Path, *, scale: float = 1.0, steps: int = STEPS, **settings: Any) -> Path:
    """A run whose numbers are multiples of `scale`; `settings` are dotted keys with `__` for the dot."""
    (folder / "rollouts").mkdir(parents=True)
    config: dict[str, Any] = {
        "run_dir": str(folder),
        "student": {"path": "models/small"},
        "teacher": {"path": "models/large"},
        "objective": {"preset": "iw-opd-exact"},
        "optimizer": {"lr": 0.001, "min_lr": None},
    }
    for key, value in settings.items():
        section, name = key.split("__")
        config.setdefault(section, {})[name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    rows = [{"step": 0, "eval/reverse_kl": 4 * scale}, *(row(step, scale) for step in range(1, steps + 1))]
    rows[-1] |= {"eval/reverse_kl": scale, "eval/math/avg@8": 0.5}
    rows[-1] |= {"eval/math/avg@8_low": 0.4, "eval/math/avg@8_high": 0.6}
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(folder / "positions.jsonl", [position_row(step, scale) for step in range(1, steps + 1)])
    for step in (1, steps):
        write_lines(folder / "rollouts" / f"step_{step:08d}.jsonl", [sample(step)])
    (folder / "rollouts" / "ledger.jsonl").write_text("")
    return folder


def position_row(step: int, scale: float) -> dict[str, Any]:
    """A row of positions.jsonl: the tokens of step n all lie in gap bin n % 3."""
    counts = [[8 if i == step % 3 else 0 for i in range(3)] for _ in range(5)]
    absolute: dict[str, Any] = {**profile(5, scale / step), "first": [0, 1, 2, 4, 8]}
    gaps = {"edges": [-1.0, 1.0], "counts": counts}
    return {"step": step, "relative": profile(10, scale / step), "absolute": absolute, "log_gap_counts": gaps}


def sample(step: int) -> dict[str, Any]:
    """A kept rollout; its second token is not in the loss."""
    ids = list(RESPONSE.encode())
    names = {"weight": 1.5, "student_logprob": -0.25, "log_gap": -0.5}
    trace = {name: [None if i == 1 else value for i in range(len(ids))] for name, value in names.items()}
    trace["weight"][2] = 1.0
    texts = {"prompt": "is 1 < 2 & 3?", "response": RESPONSE}
    return {"response_ids": ids, "finish_reason": "length", **texts, "trace": trace}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
