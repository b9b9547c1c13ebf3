"""Loss masks: which tokens of a response stay out, and how a configuration names them."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from megatron_opd.config.objective import MaskConfig
from megatron_opd.data.loss_mask import LossMask, build_loss_mask
from megatron_opd.data.rollouts import Rollout
from megatron_opd.errors import UserError
from tests.data.tiny_tokenizer import make_tokenizer


def rollout(response: list[int], finish_reason: str = "stop") -> Rollout:
    return Rollout("a", 0, [1], response, [-1.0] * len(response), finish_reason, 0)


def byte_pairs() -> PreTrainedTokenizerFast:
    """A tokenizer that spells ` think` as one token, `Ġthink`, and has no unknown token."""
    letters = ["Ġ", "<", ">", *"thinkx"]
    merges = [("t", "h"), ("i", "n"), ("in", "k"), ("th", "ink"), ("Ġ", "think")]
    words = dict.fromkeys([*letters, *("".join(pair) for pair in merges)])
    model = Tokenizer(BPE({word: i for i, word in enumerate(words)}, merges))
    model.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=model, additional_special_tokens=["<|im_end|>"])


@pytest.mark.parametrize(
    ("mask", "finish_reason", "expected"),
    [
        (LossMask(), "length", [True, True, True, True, True]),
        (LossMask(frozenset({5})), "stop", [False, True, True, True, True]),
        (LossMask(frozenset({5, 7})), "length", [False, True, True, False, True]),
        (LossMask(frozenset({5, 7}), "all"), "stop", [False, True, False, False, False]),
        (LossMask(frozenset({9})), "stop", [True, True, True, True, True]),
        (LossMask(truncated=True), "stop", [True, True, True, True, True]),
        (LossMask(truncated=True), "length", [False, False, False, False, False]),
        (LossMask(frozenset({5}), "all", truncated=True), "stop", [False, True, False, True, False]),
    ],
)
def test_which_tokens_stay_out(mask: LossMask, finish_reason: str, expected: list[bool]) -> None:
    assert mask.of(rollout([5, 6, 5, 7, 5], finish_reason)) == expected


def test_an_empty_response_has_an_empty_mask() -> None:
    assert LossMask(frozenset({5}), truncated=True).of(rollout([], "length")) == []


def test_a_mask_does_not_remember_the_rollout_before() -> None:
    mask = LossMask(frozenset({5}))
    assert mask.of(rollout([5])) == mask.of(rollout([5])) == [False]


def test_tokens_are_found_as_the_vocabulary_spells_them_or_as_text() -> None:
    tokenizer = byte_pairs()
    wanted = MaskConfig(tokens=["<", "think", " think", "<|im_end|>"], occurrences="all", truncated=True)
    mask = build_loss_mask(wanted, tokenizer)
    spelt = ["<", "think", "Ġthink", "<|im_end|>"]
    assert mask == LossMask(frozenset(tokenizer.convert_tokens_to_ids(spelt)), "all", True)
    assert len(mask.token_ids) == 4
    assert build_loss_mask(MaskConfig(tokens=["Ġthink"]), tokenizer).token_ids < mask.token_ids
    assert build_loss_mask(MaskConfig(), tokenizer) == LossMask()


def test_the_unknown_token_can_be_masked_by_its_name_only() -> None:
    tokenizer = make_tokenizer()
    assert build_loss_mask(MaskConfig(tokens=["<unk>"]), tokenizer).token_ids == {tokenizer.unk_token_id}
    with pytest.raises(UserError, match=r"^objective\.mask\.tokens: 'nowhere' is not a token"):
        build_loss_mask(MaskConfig(tokens=["one", "nowhere"]), tokenizer)


def test_what_is_not_one_token_is_refused() -> None:
    tokenizer = byte_pairs()
    with pytest.raises(
        UserError, match=r"^objective\.mask\.tokens: '<think>' is 3 tokens .*'<', 'think', '>'"
    ):
        build_loss_mask(MaskConfig(tokens=["<think>"]), tokenizer)
    with pytest.raises(UserError, match=r"^objective\.mask\.tokens: '§' is not a token"):
        build_loss_mask(MaskConfig(tokens=["§"]), tokenizer)
