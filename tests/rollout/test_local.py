"""LocalEngine on one process: it draws what the training forward gives, whatever else is in the batch."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_opd.data.prompts import Prompt
from megatron_opd.data.rollouts import Rollout
from megatron_opd.rollout.sampling import Sampling
from tests.checkpoint.models import FAMILIES, write_hf
from tests.gloo_pool import GlooPools
from tests.models.rope_variants import ROPE_VARIANTS
from tests.rollout.models import (
    PROMPTS,
    generate,
    generate_twice,
    reference,
    training_logprobs,
)

SAMPLING = Sampling(max_new_tokens=12, seed=7)


def assert_same(got: list[Rollout], expected: list[Rollout], tolerance: float = 1e-5) -> None:
    """Equal in everything, log-probs within the tolerance."""
    assert [replace(rollout, logprobs=[], drawn_logprobs=[]) for rollout in got] == [
        replace(rollout, logprobs=[], drawn_logprobs=[]) for rollout in expected
    ]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=tolerance)
        assert ours.drawn_logprobs == pytest.approx(theirs.drawn_logprobs, abs=tolerance)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("llama"), "llama", tied=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_draws_what_the_training_forward_gives(
    gloo: GlooPools, tmp_path: Path, family: str, tied: bool
) -> None:
    folder = write_hf(tmp_path, family, tied=tied)
    for sampling in (SAMPLING, replace(SAMPLING, temperature=0.0), replace(SAMPLING, temperature=1.7, n=2)):
        assert_same(gloo(1, generate, folder, sampling)[0], gloo(1, reference, folder, sampling)[0])


@pytest.mark.parametrize("variant", ROPE_VARIANTS)
def test_rope_variants_draw_what_the_training_forward_gives(
    gloo: GlooPools, tmp_path: Path, variant: str
) -> None:
    folder = write_hf(tmp_path, "llama", tied=True, rope_parameters=dict(ROPE_VARIANTS[variant]))
    assert_same(gloo(1, generate, folder, SAMPLING)[0], gloo(1, reference, folder, SAMPLING)[0])


def test_experts_with_their_plain_probabilities(gloo: GlooPools, tmp_path: Path) -> None:
    folder = write_hf(tmp_path, "qwen3_moe", tied=False, norm_topk_prob=False, num_experts_per_tok=1)
    assert_same(gloo(1, generate, folder, SAMPLING)[0], gloo(1, reference, folder, SAMPLING)[0])


def test_bf16_logprobs_are_the_training_forwards_up_to_rounding(gloo: GlooPools, llama: Path) -> None:
    rollouts = gloo(1, generate, llama, SAMPLING, precision="bf16")[0]
    errors = [
        abs(ours - theirs)
        for rollout, expected in zip(
            rollouts, gloo(1, training_logprobs, llama, rollouts, "bf16")[0], strict=True
        )
        for ours, theirs in zip(rollout.logprobs, expected, strict=True)
    ]
    assert sum(errors) / len(errors) < 0.02


def test_the_rest_of_the_batch_does_not_matter(gloo: GlooPools, llama: Path) -> None:
    sampling = replace(SAMPLING, n=2)
    together = gloo(1, generate, llama, sampling)[0]
    backwards = gloo(1, generate, llama, sampling, PROMPTS[::-1])[0]
    assert_same(sorted(backwards, key=lambda rollout: (rollout.prompt_id, rollout.sample)), together)
    alone = [rollout for prompt in PROMPTS for rollout in gloo(1, generate, llama, sampling, [prompt])[0]]
    assert_same(alone, together)
    assert_same(gloo(1, generate, llama, sampling, max_batch=3)[0], together)


def test_samples_prompt_ids_and_seeds_have_noise_of_their_own(gloo: GlooPools, llama: Path) -> None:
    tokens = PROMPTS[0].token_ids
    same_text = [Prompt(id, tokens, "") for id in ("0@0", "0@1")]
    rollouts = gloo(1, generate, llama, replace(SAMPLING, n=2), same_text)[0]
    rollouts += gloo(1, generate, llama, replace(SAMPLING, seed=8), same_text)[0]
    assert len({tuple(rollout.response_ids) for rollout in rollouts}) == 6
    assert [(rollout.prompt_id, rollout.sample) for rollout in rollouts[:4]] == [
        ("0@0", 0),
        ("0@0", 1),
        ("0@1", 0),
        ("0@1", 1),
    ]


def test_stops_at_stop_tokens_and_drops_finished_sequences(gloo: GlooPools, llama: Path) -> None:
    sampling = replace(SAMPLING, n=2)
    free = gloo(1, generate, llama, sampling)[0]
    # the first, second, ... token of most responses: they end one after another, most before the last step
    stop_ids = tuple(rollout.response_ids[i] for i, rollout in enumerate(free[:-1]))
    stopped = gloo(1, generate, llama, replace(sampling, stop_ids=stop_ids))[0]
    expected = []
    for rollout in free:
        ends = [i for i, token in enumerate(rollout.response_ids) if token in stop_ids]
        end = ends[0] + 1 if ends else len(rollout.response_ids)
        expected.append(
            replace(
                rollout,
                response_ids=rollout.response_ids[:end],
                logprobs=rollout.logprobs[:end],
                drawn_logprobs=rollout.logprobs[:end],
                finish_reason="stop" if ends else "length",
            )
        )
    assert_same(stopped, expected)
    assert len({len(rollout.response_ids) for rollout in stopped}) > 2


def test_a_prompts_first_token_may_repeat_and_one_token_may_be_asked(gloo: GlooPools, llama: Path) -> None:
    prompt = Prompt("0", [1, 1, 1, 5], "")  # the BOS id is an ordinary token of the prompt
    (rollout,) = gloo(1, generate, llama, replace(SAMPLING, max_new_tokens=1), [prompt])[0]
    assert rollout.prompt_ids == [1, 1, 1, 5] and len(rollout.response_ids) == 1
    assert rollout.logprobs == pytest.approx(
        gloo(1, training_logprobs, llama, [rollout], "fp32")[0][0], abs=1e-5
    )


def test_no_prompts_no_rollouts(gloo: GlooPools, llama: Path) -> None:
    assert gloo(1, generate, llama, SAMPLING, [])[0] == []


def test_uses_the_present_weights_and_leaves_the_model_as_it_was(gloo: GlooPools, llama: Path) -> None:
    before, after, modes_kept = gloo(1, generate_twice, llama, SAMPLING)[0]
    assert modes_kept
    assert [r.logprobs for r in before] != [r.logprobs for r in after]
    assert {r.weight_version for r in after} == {4}


def test_many_prompt_tokens_take_several_passes(gloo: GlooPools, llama: Path) -> None:
    assert_same(
        gloo(1, _with_few_prompt_tokens, llama, replace(SAMPLING, n=2))[0],
        gloo(1, generate, llama, replace(SAMPLING, n=2))[0],
    )


def _with_few_prompt_tokens(folder: Path, sampling: Sampling) -> list[Rollout]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_opd.rollout.local.PROMPT_TOKENS", 8)
        return generate(folder, sampling)
