"""What a divergence function knows about every token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenStats:
    """Per-token results, all of shape [N], in nats, float32 (float64 for float64 logits).

    With tensor parallelism every rank of the group holds the same values. Log-probabilities are those of the
    given target tokens under softmax(logits / temperature); they are None where no targets were given, the
    entropies where none were asked for, the exact reverse KL where the teacher gave less than all its logits,
    the masses where the support is the whole vocabulary. All but the first two are detached. Where both models were
    restricted to the ids that sampling kept, everything is of the restricted distributions. Where the teacher gave
    log-probabilities of the sampled tokens only, the divergence is their estimate of reverse KL, without a gradient.
    """

    divergence: Tensor  # differentiable in the student
    student_logprob: Tensor | None = None  # differentiable in the student
    teacher_logprob: Tensor | None = None
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    reverse_kl: Tensor | None = None  # over the whole vocabulary, whatever the divergence is
    student_mass: Tensor | None = None  # probability that the student gives to the support
    teacher_mass: Tensor | None = None

    @property
    def log_gap(self) -> Tensor:
        """A = log p_teacher(target) - log p_student(target), detached, [N]. ValueError without targets."""
        if self.student_logprob is None or self.teacher_logprob is None:
            raise ValueError("the log-gap needs the targets: pass targets= to the divergence")
        return (self.teacher_logprob - self.student_logprob).detach()
