"""Steps of a whole job are the same whatever a Megatron teacher hands over, and the evaluation stays exact."""

from pathlib import Path
from typing import Any

import pytest

from megatron_opd.train import train_step
from megatron_opd.training.evaluating import evaluate
from tests.data.tiny_tokenizer import write_prompts
from tests.gloo_pool import GlooPools
from tests.training.test_job import build, save_job_models


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_job_models(folder)
    write_prompts(folder / "prompts.jsonl", 12)
    return folder


def steps(
    inputs: Path, run_dir: Path, kinds: tuple[str, ...], **changes: Any
) -> list[list[dict[str, float]]]:
    """Of each kind of payload two steps and an evaluation."""
    found = []
    for kind in kinds:
        job = build(inputs, run_dir / kind, rollout__temperature=0.7, teacher__payload=kind, **changes)
        rows = [*(train_step(job, step)[0] for step in (1, 2)), evaluate(job, 2)]
        found.append([{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows])
    return found


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("logits", {"objective__preset": "gkd", "objective__head_chunk": 5}),
        ("topk", {"objective__preset": "mopd", "training__updates_per_rollout": 2}),
        ("sampled", {"objective__preset": "iw-opd"}),
    ],
)
def test_a_job_takes_the_same_steps(
    gloo: GlooPools, inputs: Path, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    expected, found = gloo(1, steps, inputs, tmp_path, ("hidden_states", kind), **changes)[0]
    assert found[-1]["eval/reverse_kl"] == pytest.approx(expected[-1]["eval/reverse_kl"], rel=1e-4)
    for row, want in zip(found, expected, strict=True):
        names = set(want) - ({"reverse_kl", "teacher_entropy"} if kind != "logits" else set())
        assert set(row) - {"reverse_kl_sampled"} == names
        for name in names:
            assert row[name] == pytest.approx(want[name], rel=1e-3, abs=1e-4), name
