"""What a teacher hands to the objective for a microbatch.

A Megatron teacher has several kinds of payload. Of each it is known beforehand, from `PayloadFormat` alone, which
tensors it consists of: whoever carries payloads from rank to rank needs no more.

Shapes: N loss positions of a microbatch (of this context-parallel rank's share of it), D the teacher's hidden size, V
padded vocabulary, K ids of the support.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_opd.config.schema import PayloadKind
from megatron_opd.objectives import ServedLogprobs


@dataclass(frozen=True)
class HiddenStates:
    """The teacher's final-norm hidden states [N, D] at the loss positions."""

    hidden_ND: Tensor


@dataclass(frozen=True)
class WholeLogits:
    """The teacher's logits of every real id [N, vocab_size] at the loss positions, not divided by a temperature."""

    logits_NV: Tensor


@dataclass(frozen=True)
class Awaited:
    """A payload on its way: `wait` returns it, once, when it is there. See `window.Inbox` for the order."""

    wait: Callable[[], "TeacherPayload"]


@dataclass(frozen=True)
class Part:
    """What one of several teachers says: `weight` times the loss with it alone is part of the loss."""

    teacher: str
    weight: float
    payload: "TeacherPayload"


@dataclass(frozen=True)
class Mixture:
    """What several teachers say of a microbatch: the loss is the sum over the parts."""

    parts: tuple[Part, ...]


TeacherPayload = HiddenStates | WholeLogits | ServedLogprobs | Awaited | Part | Mixture


def weight_of(payload: TeacherPayload) -> float:
    """That of the loss with the teacher of this payload in the whole loss."""
    return payload.weight if isinstance(payload, Part) else 1.0


class TensorFormat(NamedTuple):
    """One tensor of a payload: [N, *trailing]; row n is of the n-th loss position."""

    trailing: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class PayloadFormat:
    """What a Megatron teacher hands over of each loss position; the same on every rank, those without a teacher too.

    hidden_states: D numbers, which whoever holds a shard of the teacher's head projects. logits: those of the whole
    vocabulary, for debugging. topk: log-probs of the sampled token and of the K likeliest ids. sampled: of the sampled
    token. `dtype` is the model's; log-probs are float32, at `temperature`.
    """

    kind: PayloadKind
    hidden_size: int
    vocab_size: int  # real ids common to student and teacher
    dtype: torch.dtype
    k: int = 0  # of topk
    temperature: float = 1.0  # of topk and sampled

    @property
    def tensors(self) -> tuple[TensorFormat, ...]:
        """What `tensors_of` takes a payload apart into."""
        sampled, k = TensorFormat((), torch.float32), min(self.k, self.vocab_size)
        return {
            "hidden_states": (TensorFormat((self.hidden_size,), self.dtype),),
            "logits": (TensorFormat((self.vocab_size,), self.dtype),),
            "topk": (sampled, TensorFormat((k,), torch.int32), TensorFormat((k,), torch.float32)),
            "sampled": (sampled,),
        }[self.kind]

    @property
    def bytes_per_position(self) -> int:
        """Of all tensors, to keep and to send."""
        return sum(prod(trailing) * dtype.itemsize for trailing, dtype in self.tensors)

    def of_kind(self, kind: PayloadKind | None) -> "PayloadFormat":
        """The format of payloads of another kind; None: this one."""
        return self if kind is None else replace(self, kind=kind)

    def payload(self, tensors: Sequence[Tensor]) -> TeacherPayload:
        """The payload that these tensors are."""
        if self.kind == "hidden_states":
            return HiddenStates(*tensors)
        return WholeLogits(*tensors) if self.kind == "logits" else ServedLogprobs(*tensors)


def tensors_of(payload: TeacherPayload) -> tuple[Tensor, ...]:
    """The tensors [N, ...] of a payload, in the order of `PayloadFormat.tensors`."""
    assert not isinstance(payload, Awaited), "it has to be waited for"
    assert not isinstance(payload, Part | Mixture), "its parts' payloads have some"
    if isinstance(payload, HiddenStates):
        return (payload.hidden_ND,)
    if isinstance(payload, WholeLogits):
        return (payload.logits_NV,)
    if payload.ids is None or payload.ids_logprob is None:
        return (payload.logprob,)
    return payload.logprob, payload.ids, payload.ids_logprob
