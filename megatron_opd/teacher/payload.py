"""What a teacher hands to the objective for a microbatch, and what a teacher is.

Shapes: N loss positions of a microbatch (of this context-parallel rank's share of it), D the teacher's hidden size, V
padded vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_opd.data.packing import Microbatch
from megatron_opd.objectives import LinearLogits, ServedLogprobs


@dataclass(frozen=True)
class HiddenStates:
    """The teacher's final-norm hidden states [N, D] at the loss positions."""

    hidden_ND: Tensor


TeacherPayload = HiddenStates | ServedLogprobs


class Teacher(Protocol):
    """What scores microbatches: `MegatronTeacher` or `SGLangTeacher`."""

    def score(self, microbatches: Sequence[Microbatch]) -> Sequence[TeacherPayload | None]:
        """One payload a microbatch on the last pipeline stage, None on the others. Collective."""
        ...

    def distribution(
        self, payload: TeacherPayload, *, chunked: bool
    ) -> Tensor | LinearLogits | ServedLogprobs:
        """What the objective reads of a payload: logits [N, V/TP], here or, `chunked`, later; or what a server said.

        Last stage only, no collectives.
        """
        ...
