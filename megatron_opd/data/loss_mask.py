"""Which response tokens enter the loss: not the special tokens and truncated responses that one leaves out.

Some tokens are no matter of quality but of the models' formats: a teacher trained on another chat format gives
the student's `<|im_end|>` a log-probability of -58, and such tokens dominate the loss (arXiv 2603.25562, which
masks the first occurrence of each). A masked token stays in the sequence that later tokens are predicted from.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_opd.config.objective import MaskConfig
from megatron_opd.data.rollouts import Rollout
from megatron_opd.errors import UserError


@dataclass(frozen=True)
class LossMask:
    """What to leave out of the loss; nothing by default."""

    token_ids: frozenset[int] = frozenset()
    occurrences: str = "first"  # "first" of each id in a response, or "all"
    truncated: bool = False  # also every token of a response that ended by length

    def of(self, rollout: Rollout) -> list[bool]:
        """Whether each token of the response enters the loss."""
        if self.truncated and rollout.finish_reason == "length":
            return [False] * len(rollout.response_ids)
        if self.occurrences == "all":
            return [token not in self.token_ids for token in rollout.response_ids]
        mask, pending = [], set(self.token_ids)
        for token in rollout.response_ids:
            mask.append(token not in pending)
            pending.discard(token)
        return mask


def build_loss_mask(settings: MaskConfig, tokenizer: PreTrainedTokenizerBase) -> LossMask:
    """The mask that `objective.mask` asks for.

    Raises UserError when one of its tokens is not exactly one token of the tokenizer.
    """
    vocabulary = tokenizer.get_vocab()
    ids = frozenset(_token_id(token, vocabulary, tokenizer) for token in settings.tokens)
    return LossMask(ids, settings.occurrences, settings.truncated)


def _token_id(token: str, vocabulary: dict[str, int], tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token spelt like this in the vocabulary, or else of the one that the text becomes."""
    if token in vocabulary:
        return vocabulary[token]
    ids = tokenizer.encode(token, add_special_tokens=False)
    key = f"objective.mask.tokens: {token!r}"
    if len(ids) > 1:
        pieces = ", ".join(repr(piece) for piece in tokenizer.convert_ids_to_tokens(ids))
        raise UserError(
            f"{key} is {len(ids)} tokens of the student's tokenizer: list those to mask of {pieces}"
        )
    if not ids or ids[0] == tokenizer.unk_token_id:
        raise UserError(f"{key} is not a token of the student's tokenizer: remove or correct it")
    return ids[0]
