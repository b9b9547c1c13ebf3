"""The ledger of rollouts: what every step consumed, once, whatever was interrupted and resumed."""

import json
from pathlib import Path

from megatron_opd.data.rollouts import Rollout
from megatron_opd.report.ledger import LEDGER_FILE, Ledger
from megatron_opd.report.step_lines import read_steps


def consume(run_dir: Path, steps: range, *, last_kept: int = 0, version: int = 0) -> None:
    ledger = Ledger(run_dir, last_kept)
    for step in steps:
        ids = [7] * step
        ledger.log(
            step, [Rollout(f"{step}@0", 1, [5], ids, [-1.0] * step, "length", version, [[1, version + 2]])]
        )
    ledger.close()


def test_a_line_a_step_with_prompt_sample_versions_and_tokens(tmp_path: Path) -> None:
    consume(tmp_path, range(1, 3))
    assert read_steps(tmp_path / LEDGER_FILE) == [
        {"step": 1, "rollouts": [{"prompt": "1@0", "sample": 1, "versions": [0, 2], "tokens": 1}]},
        {"step": 2, "rollouts": [{"prompt": "2@0", "sample": 1, "versions": [0, 2], "tokens": 2}]},
    ]


def test_resuming_sets_aside_what_is_consumed_again(tmp_path: Path) -> None:
    consume(tmp_path, range(1, 5))
    path = tmp_path / LEDGER_FILE
    path.write_text(path.read_text()[:-9])  # killed while it wrote step 4
    consume(tmp_path, range(3, 5), last_kept=2, version=1)
    kept = [(row["step"], row["rollouts"][0]["versions"]) for row in read_steps(path)]
    assert kept == [(1, [0, 2]), (2, [0, 2]), (3, [1, 3]), (4, [1, 3])]
    aside = path.with_name("ledger.discarded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in aside] == [3]


def test_a_run_that_starts_anew_has_an_empty_ledger(tmp_path: Path) -> None:
    consume(tmp_path, range(1, 3))
    Ledger(tmp_path, 0).close()
    assert read_steps(tmp_path / LEDGER_FILE) == []
