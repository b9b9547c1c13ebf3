"""Logits shards as the divergences read them: given as a tensor, or hidden states times a head shard, in chunks.

Shape suffixes: N tokens, C tokens of a chunk, V columns of the shard (V/TP), D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Of the block of head rows whose gradient is computed at once: on a CPU it should stay in the cache until it is added.
CPU_WEIGHT_GRADIENT_ELEMENTS = 2**21
DEVICE_WEIGHT_GRADIENT_ELEMENTS = 2**24
MASKED_ELEMENTS = 2**25  # of given logits that are copied at once, to mask the copy


class LinearLogits(NamedTuple):
    """The logits shard hidden @ weight.T, which never exists as a whole: it is computed chunk by chunk, twice.

    weight_grad, if given, is a float32 buffer of the weight's shape (Megatron's `main_grad`) that the backward
    pass adds the weight's gradient to; the gradient that autograd sees is then zero, so that hooks still fire.
    """

    hidden: Tensor  # [N, D], or this rank's [N/TP, D] where the caller says sequence_parallel
    weight: Tensor  # [V/TP, D]
    weight_grad: Tensor | None = None


class LogitsReader:
    """Hands out logits [C, V] of slices of tokens, in one buffer that the next slice overwrites.

    For given logits a slice is a view of them and nothing is copied, unless ids are left out.
    """

    def __init__(self, logits_or_hidden: Tensor, weight_VD: Tensor | None) -> None:
        self.tensor = logits_or_hidden
        self.weight_VD = weight_VD
        self._buffer_CV: Tensor | None = None

    def read(self, tokens: slice, left_out_CV: Tensor | None = None) -> Tensor:
        """The logits of these tokens, all columns; -inf where `left_out_CV`, which may have fewer columns, says so."""
        if self.weight_VD is None:
            logits_CV = self.tensor[tokens]
            if left_out_CV is None:
                return logits_CV
            return logits_CV[:, : left_out_CV.shape[1]].masked_fill(left_out_CV, -torch.inf)
        hidden_CD = self.tensor[tokens].to(self.weight_VD.dtype)
        if self._buffer_CV is None:
            self._buffer_CV = hidden_CD.new_empty(hidden_CD.shape[0], self.weight_VD.shape[0])
        logits_CV = torch.mm(hidden_CD, self.weight_VD.t(), out=self._buffer_CV[: hidden_CD.shape[0]])
        if left_out_CV is not None:
            logits_CV[:, : left_out_CV.shape[1]].masked_fill_(left_out_CV, -torch.inf)
        return logits_CV


class LogitsPair(NamedTuple):
    """Student and, unless a server stands in for it, teacher.

    left_out tells of a slice of tokens which columns neither model may draw from, bool [C, V].
    """

    student: LogitsReader
    teacher: LogitsReader | None
    left_out: Callable[[slice], Tensor] | None = None

    @classmethod
    def of(
        cls,
        student: Tensor,
        student_weight: Tensor | None,
        teacher: Tensor | None,
        teacher_weight: Tensor | None,
        left_out: Callable[[slice], Tensor] | None = None,
    ) -> LogitsPair:
        """From logits, or from hidden states and a head shard, of each model."""
        reader = None if teacher is None else LogitsReader(teacher, teacher_weight)
        return cls(LogitsReader(student, student_weight), reader, left_out)

    def chunks(self, size: int | None) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """(tokens, student logits, teacher logits) for slices of `size` tokens, the last one shorter.

        One slice of all where nothing has to be computed or size is None; an empty slice where N = 0. Given logits of
        which ids are left out are copied, so these go by slices of MASKED_ELEMENTS.
        """
        count, width = self.student.tensor.shape
        if self.student.weight_VD is None and (self.teacher is None or self.teacher.weight_VD is None):
            size = None if self.left_out is None else max(1, MASKED_ELEMENTS // max(1, width))
        for tokens in slices(count, size):
            left_out_CV = None if self.left_out is None else self.left_out(tokens)
            yield (
                tokens,
                self.student.read(tokens, left_out_CV),
                None if self.teacher is None else self.teacher.read(tokens, left_out_CV),
            )


def slices(count: int, size: int | None) -> Iterator[slice]:
    """Consecutive slices of `size` that cover `count` (None: one slice of all), at least one."""
    size = max(count, 1) if size is None else size
    for start in range(0, max(count, 1), size):
        yield slice(start, min(start + size, count))


class HeadGradient:
    """Gathers the gradients of hidden states and, unless it is frozen, head weight from chunks of logits gradients."""

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        weight_grad_VD: Tensor | None,
        chunk: int | None,
        *,
        frozen: bool,
    ) -> None:
        self.hidden_ND, self.weight_VD = hidden_ND, weight_VD
        self.hidden_grad_ND = torch.empty_like(hidden_ND)
        one_chunk = chunk is None or chunk >= hidden_ND.shape[0]
        self.returned: Tensor | None = None
        if weight_grad_VD is None and not frozen:
            # Sums over chunks are kept in float32 at least; a single chunk needs no sum.
            dtype = weight_VD.dtype if one_chunk else torch.promote_types(weight_VD.dtype, torch.float32)
            weight_grad_VD = self.returned = torch.zeros_like(weight_VD, dtype=dtype)
        self._frozen = frozen
        self._weight_grad_VD = weight_grad_VD

    def add(self, tokens: slice, logits_grad_CV: Tensor) -> None:
        """Takes the complete gradient [C, V] of these tokens' logits, in the weight's dtype."""
        self.hidden_grad_ND[tokens] = torch.mm(logits_grad_CV, self.weight_VD)
        if self._frozen:
            return
        assert self._weight_grad_VD is not None
        hidden_CD = self.hidden_ND[tokens].to(self.weight_VD.dtype)
        if self._weight_grad_VD.dtype == logits_grad_CV.dtype:
            self._weight_grad_VD.addmm_(logits_grad_CV.t(), hidden_CD)
            return
        on_cpu = hidden_CD.device.type == "cpu"
        elements = CPU_WEIGHT_GRADIENT_ELEMENTS if on_cpu else DEVICE_WEIGHT_GRADIENT_ELEMENTS
        for rows in slices(self.weight_VD.shape[0], max(1, elements // hidden_CD.shape[1])):
            self._weight_grad_VD[rows] += torch.mm(logits_grad_CV[:, rows].t(), hidden_CD)

    def weight_gradient(self) -> Tensor | None:
        """What autograd gets for the weight, in its dtype."""
        if self._frozen:
            return None
        if self.returned is None:
            return torch.zeros_like(self.weight_VD)
        return self.returned.to(self.weight_VD.dtype)
