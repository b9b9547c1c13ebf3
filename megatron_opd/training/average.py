"""The moving average of the student's weights that its teacher becomes: decay * average + (1 - decay) * student.

It is float32 whatever the precision: bf16 would round a small move away, over and over. The teacher runs with the
rounded average of the latest end of a step, so that what it has scored and its LM head belong together through all the
updates of a step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_opd.models.gpt import GPT
from megatron_opd.training.student import Student


class WeightAverage:
    """The average, of this rank's shards: 4 bytes a weight besides the teacher's, on all data-parallel ranks alike.

    It starts at the weights of `chunks`, the teacher's, which has the student's architecture and layout.
    """

    def __init__(self, chunks: Sequence[GPT], decay: float) -> None:
        self._chunks, self._decay = chunks, decay
        self._weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._averages = [weight.detach().to(torch.float32, copy=True) for weight in self._weights]

    @torch.no_grad()
    def follow(self, student: Student) -> None:
        """Move the average after an update, not the teacher yet. Collectives: those of `Student.main_weights`."""
        for average, weight in zip(self._averages, student.main_weights(), strict=True):
            average.lerp_(weight, 1 - self._decay)

    @torch.no_grad()
    def hand_over(self) -> None:
        """Give the teacher the average of now."""
        for weight, average in zip(self._weights, self._averages, strict=True):
            weight.copy_(average)

    @contextmanager
    def as_model(self) -> Iterator[Sequence[GPT]]:
        """The teacher's chunks, inside with the average itself as weights: to be saved or filled, not to be run.

        At the end the teacher has the average of now.
        """
        rounded = [weight.data for weight in self._weights]
        for weight, average in zip(self._weights, self._averages, strict=True):
            weight.data = average
        try:
            yield self._chunks
        finally:
            for weight, data in zip(self._weights, rounded, strict=True):
                weight.data = data
        self.hand_over()
