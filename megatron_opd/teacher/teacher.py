"""What a teacher is to the training loop, whatever its kind, and what it is asked about."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_opd.config.schema import PayloadKind
from megatron_opd.data.packing import Microbatch
from megatron_opd.objectives import LinearLogits, ServedLogprobs
from megatron_opd.teacher.payload import TeacherPayload


@dataclass(frozen=True)
class Asked:
    """The microbatches of an update as a rank of the student has them. Each kind of teacher reads what it needs."""

    microbatches: Sequence[Microbatch]  # this rank's shares
    whole: Sequence[Sequence[Microbatch]] = ()  # the whole ones of all data-parallel ranks
    routes: Sequence[str] = ()  # of routed prompts, the teacher of the i-th microbatch of each rank
    evaluation: bool = False  # whether it is for plain reverse KL, and not for the objective
    student_ids: Callable[[], Sequence[Tensor | None]] | None = None
    """The student's likeliest ids [N, K] of each microbatch, None but on the last stage; a forward pass, on all ranks.
    None: the objective does not read them."""

    @property
    def kind(self) -> PayloadKind | None:
        """Of a Megatron teacher's payloads; None: the run's."""
        return "hidden_states" if self.evaluation else None

    def only(self, numbers: Sequence[int]) -> "Asked":
        """The same about these microbatches of each rank alone, for a teacher that does not read `student_ids`."""
        return replace(
            self,
            microbatches=[self.microbatches[i] for i in numbers],
            whole=[[rank[i] for i in numbers] for rank in self.whole],
            routes=[self.routes[i] for i in numbers] if self.routes else (),
            student_ids=None,
        )


class Teacher(ABC):
    """What scores the tokens of the rollouts: all ranks of the student have it, and call it together."""

    gives_distributions = True
    """Whether an evaluation has all that it knows of a token; if not, the log-prob of the sampled one."""

    @abstractmethod
    def score(self, asked: Asked) -> Sequence[TeacherPayload | None]:
        """One payload a microbatch of this rank's on the last pipeline stage, None on the others. Collective."""

    @abstractmethod
    def distribution(
        self, payload: TeacherPayload, *, chunked: bool
    ) -> Tensor | LinearLogits | ServedLogprobs:
        """What the objective reads of a payload: logits [N, V/TP], here or, `chunked`, later; or log-probs.

        Last stage only, no collectives.
        """

    @property
    def names(self) -> Sequence[str]:
        """Of several teachers in one: the tokens and the distance of each are counted."""
        return ()

    def described(self) -> str:
        """What the user should know of it before the first step; empty: nothing."""
        return ""

    def metrics(self) -> dict[str, float]:
        """Of the payloads last asked for, once all of them have been read."""
        return {}

    def before_save(self, step: int) -> None:  # noqa: B027
        """The run is about to save `step`."""

    def before_publish(self) -> None:  # noqa: B027
        """The run is about to complete that save."""

    def finish(self, *, early: bool = False) -> None:  # noqa: B027  most kinds have nothing to do
        """The run is complete, or has been stopped (`early`) before its last step."""
