"""Steps of a job whose rollouts a real server draws ahead, given its weights by the transports that send them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.data.rollouts import Rollout
from megatron_opd.train import train_step
from megatron_opd.training.serving import serving
from tests.data.tiny_tokenizer import write_prompts
from tests.gloo_pool import GlooPools
from tests.sglang_server import SGLangServer
from tests.training.test_job import build

STEPS = 4


@pytest.fixture
def folder(tmp_path: Path, sglang: SGLangServer) -> Iterator[Path]:
    """A `student` of the architecture that the server has, a `teacher`, and prompts."""
    for name, model in (("student", 1), ("teacher", 0)):
        sglang.link(model, tmp_path / name)
    write_prompts(tmp_path / "prompts.jsonl", 12)
    yield tmp_path
    sglang.load(sglang.models[0], "0")


def steps_ahead(
    folder: Path, url: str, transport: str
) -> tuple[list[tuple[dict[str, Any], list[Rollout]]], dict[str, float]]:
    """(metrics, rollouts) of every step, and the sums of an update on rollouts of the weights after the last."""
    job = build(
        folder,
        folder / "run",
        rollout__engine="sglang",
        rollout__sglang__urls=f"[{url}]",
        rollout__weight_sync=transport,
        rollout__max_staleness=1,
        rollout__max_new_tokens=40,
        rollout__prompts_per_step=6,
        training__microbatch_tokens=128,
        training__steps=STEPS,
        objective__preset="opd",
    )
    said: list[str] = []
    taken = []
    with serving(job, said.append) as publish:
        publish(0)
        for step in range(1, STEPS + 1):
            taken.append(train_step(job, step, publish)[:2])
            publish(step)
        last = job.draw(job.texts.training.prompts[:4], step=STEPS, seed=9, samples=1)
        (update,) = job.score(last)
        measured = job.apply(update, 1.0).measured
        assert measured is not None
        return taken, {name: value / update.scale.loss_tokens for name, value in measured.sums.items()}


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
def test_every_token_is_of_weights_that_it_is_known_by(
    gloo: GlooPools, sglang: SGLangServer, folder: Path, transport: str
) -> None:
    taken, last = gloo(1, steps_ahead, folder, sglang.url, transport)[0]
    for step, (row, rollouts) in enumerate(taken, start=1):
        versions = [version for each in rollouts for version in each.token_versions]
        assert max(0, step - 2) <= min(versions) and max(versions) <= step - 1
        assert (row["staleness"] == 0) == (row["logprob_mismatch"] < 1e-4)
    assert any(row["staleness"] > 0 for row, _ in taken)
    prompts = [each.prompt_id for _, rollouts in taken for each in rollouts]
    assert len(prompts) == 6 * STEPS and len(set(prompts[:12])) == 12, "an epoch, each prompt once"
    assert last["logprob_mismatch"] < 1e-4, "the server has the student's weights"
