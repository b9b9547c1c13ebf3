"""Every response token of an update counts 1/M, whatever microbatch, rank and length of response it is in.

The truth is built from parts: the gradient of each rollout alone, computed in one process, times its share of tokens.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_opd.config.schema import OptimizerConfig
from megatron_opd.data.packing import Microbatch
from megatron_opd.data.rollouts import Rollout
from megatron_opd.parallel.groups import ParallelLayout as Layout
from tests.tiny import VOCAB
from tests.training.tiny_run import TinyRun, build_run

ONE = Layout()
WHOLE = OptimizerConfig(distributed=False)
REPLICAS = [
    Layout(data=2),
    Layout(pipeline=2, data=2),
    pytest.param(Layout(data=4), marks=pytest.mark.full),
    pytest.param(Layout(tensor=2, sequence_parallel=True, data=2), marks=pytest.mark.full),
    pytest.param(Layout(pipeline=2, virtual_pipeline=2, data=2), marks=pytest.mark.full),
]
Gradients = dict[str, torch.Tensor]


def rollouts_of(*lengths: int, prompt: int = 3) -> list[Rollout]:
    """Rollouts with responses of these lengths."""
    generator = torch.Generator().manual_seed(5)

    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

    return [
        Rollout(str(i), 0, ids(prompt), ids(length), [-2.0] * length, "length", 0)
        for i, length in enumerate(lengths)
    ]


def _parts(models: Path, rollouts: list[Rollout]) -> Gradients:
    """The mean over all response tokens, from the mean over each rollout's."""
    run = build_run(ONE, models, optimizer=WHOLE)
    total = sum(len(rollout.response_ids) for rollout in rollouts)
    summed: Gradients = {}
    for rollout in rollouts:
        run.accumulate(run.pack([rollout]))
        share = len(rollout.response_ids) / total
        for name, gradient in run.gradients().items():
            summed[name] = summed.get(name, 0.0) + share * gradient
    return summed


def _together(layout: Layout, models: Path, rollouts: list[Rollout]) -> tuple[Gradients, list[list[int]]]:
    """Gradients, and the loss tokens of every rank's microbatches."""
    run = build_run(layout, models, optimizer=WHOLE)
    packed = run.pack(rollouts)
    run.accumulate(packed)
    return run.gradients(), [[int(microbatch.mask_T.sum()) for microbatch in rank] for rank in packed]


def assert_close(gradients: Gradients, expected: Gradients) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("layout", REPLICAS, ids=str)
def test_very_uneven_lengths(gloo, models, layout):
    """A mean of means would weigh the token of a short response 60 times."""
    rollouts = rollouts_of(60, 1, 30, 1, 2, 1, 1)
    expected = gloo(1, _parts, models, rollouts)[0]
    for gradients, counts in gloo(layout.world_size, _together, layout, models, rollouts):
        assert min(map(sum, counts)) < max(map(sum, counts)), "replicas with equally many tokens show nothing"
        assert_close(gradients, expected)


@pytest.mark.parametrize("layout", REPLICAS, ids=str)
def test_a_replica_without_any_response_token(gloo, models, layout):
    rollouts = rollouts_of(20)
    expected = gloo(1, _parts, models, rollouts)[0]
    for gradients, counts in gloo(layout.world_size, _together, layout, models, rollouts):
        assert sorted(map(sum, counts)) == [0] * (layout.data - 1) + [20]
        assert_close(gradients, expected)


@pytest.mark.parametrize("layout", REPLICAS, ids=str)
def test_replicas_with_different_numbers_of_microbatches(gloo, models, layout):
    """Responses that fill a microbatch each: the replica with fewer runs empty ones along."""
    rollouts = rollouts_of(80, 70, 60, 50, 75)
    expected = gloo(1, _parts, models, rollouts)[0]
    for gradients, counts in gloo(layout.world_size, _together, layout, models, rollouts):
        real = {sum(tokens > 0 for tokens in rank) for rank in counts}
        assert len(real) == 2 and len({len(rank) for rank in counts}) == 1
        assert_close(gradients, expected)


def _masked(layout: Layout, models: Path, rollouts: list[Rollout]) -> tuple[Gradients, list[Microbatch]]:
    """With the mask of the first microbatch of the last replica False everywhere; its tokens are still routed."""
    run: TinyRun = build_run(layout, models, optimizer=WHOLE)
    packed = run.pack(rollouts)
    gone = packed[-1][0]
    packed[-1][0] = replace(
        gone,
        mask_T=torch.zeros_like(gone.mask_T),
        targets_T=torch.zeros_like(gone.targets_T),
        rollout_logprobs_T=torch.zeros_like(gone.rollout_logprobs_T),
    )
    run.accumulate(packed)
    return run.gradients(), [gone]


@pytest.mark.parametrize("layout", [ONE, *REPLICAS], ids=str)
def test_a_microbatch_that_is_all_masked(gloo, models, layout):
    rollouts = rollouts_of(80, 70, 60, 50, 75)
    for gradients, (gone,) in gloo(layout.world_size, _masked, layout, models, rollouts):
        first = gone.tokens_T[:3].tolist()
        left = [rollout for rollout in rollouts if rollout.prompt_ids != first]
        assert len(left) == len(rollouts) - 1
        assert_close(gradients, gloo(1, _parts, models, left)[0])
