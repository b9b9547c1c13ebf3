"""One optimizer update: its scored microbatches, and the pass of the objective over them.

The loss of an update is the sum over ALL its unmasked response tokens (microbatches, data- and context-parallel
ranks) of weight * estimator, divided by their number M: never a mean of means. megatron-core divides the accumulated
gradient by T_all, the tokens of the update, so the loss function returns sum * T_all / M. The balancing losses of
experts, which megatron-core adds in the backward pass, are sums over tokens too and become a mean by that division.

Shapes: T tokens of a microbatch (of this context-parallel rank's share of it), N its loss positions, V padded
vocabulary, TP tensor-parallel size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_opd.data.packing import Microbatch, count_loss_tokens, count_tokens
from megatron_opd.errors import UserError
from megatron_opd.models.gpt import GPT, packed_forward
from megatron_opd.models.lm_head import logits_shard, select_positions
from megatron_opd.objectives import LinearLogits, Objective, TokenStats
from megatron_opd.parallel.schedule import run_schedule
from megatron_opd.report.positions import Diagnostics
from megatron_opd.teacher.payload import Mixture, TeacherPayload, weight_of
from megatron_opd.teacher.teacher import Teacher
from megatron_opd.training.agreement import MAXIMA, SUMS, agreement, step_agreement
from megatron_opd.training.per_teacher import add_values, is_of_one, own_sums, per_teacher, sum_names
from megatron_opd.training.positions import (
    TRACED_TOKENS,
    PositionSums,
    token_trace,
    trace_size,
    traces_of,
)


@dataclass(frozen=True)
class UpdateScale:
    """How the sums of one update are normalised, known on every rank before the forward pass.

    `loss_tokens` is M, the unmasked response tokens; `tokens` is T_all, those of prompts and responses.
    """

    loss_tokens: int
    tokens: int

    @classmethod
    def of(cls, packed: Sequence[Sequence[Microbatch]]) -> "UpdateScale":
        """Counted over the whole microbatches of all data-parallel ranks (every rank packs the same rollouts)."""
        everything = [microbatch for rank in packed for microbatch in rank]
        return cls(count_loss_tokens(everything), count_tokens(everything))


@dataclass(frozen=True)
class Update:
    """This rank's microbatches of an update, and what was computed of them before the student moved.

    The lists have an entry a microbatch, None where this rank is not on the last pipeline stage.
    """

    microbatches: Sequence[Microbatch]
    scale: UpdateScale
    payloads: Sequence[TeacherPayload | None]
    old_logprobs: Sequence[Tensor | None] | None = None  # [N] each; None: not moved, or they are not read
    reference_logprobs: Sequence[Tensor | None] | None = None  # [N] each; None: there is no reference
    moved: bool = False  # the student moves after it was scored and before this update
    whole: Sequence[Sequence[Microbatch]] = ()  # the whole microbatches of all data-parallel ranks
    routes: Sequence[str] = ()  # of routed prompts, each microbatch's teacher
    lengths: Sequence[int] = ()  # response tokens of its first rollouts, whose tokens are recorded one by one

    @property
    def traced(self) -> int:
        """How many tokens that are."""
        return min(sum(self.lengths), TRACED_TOKENS)

    def rows(self) -> list[tuple[Microbatch, Any, Tensor | None, Tensor | None]]:
        """(microbatch, payload, old log-probs, reference log-probs), one a microbatch."""
        nothing = [None] * len(self.microbatches)
        return list(
            zip(
                self.microbatches,
                self.payloads,
                self.old_logprobs or nothing,
                self.reference_logprobs or nothing,
                strict=True,
            )
        )


@dataclass(frozen=True)
class Measured:
    """What a pass says of all tokens of an update, the same on every rank."""

    sums: dict[str, float]  # of the objective's values and of `agreement`, with its maxima
    by_position: Tensor  # of `PositionSums`, float64 on the CPU
    trace: Tensor  # of `token_trace`, float64 on the CPU


@dataclass(frozen=True)
class ObjectivePass:
    """The objective, the teachers and the student's model and groups: what a pass over microbatches needs."""

    gpt: GPT  # the student's last chunk of this rank: on the last stage it has the LM head
    teacher: Teacher
    objective: Objective
    vocab_size: int  # real vocabulary common to student and teacher
    groups: ProcessGroupCollection
    check: bool = False  # judge the logits, and end with the name of the tensor when they are not finite
    head_chunk: int | None = None  # tokens whose logits exist at once; None: those of a microbatch
    mismatch_threshold: float = 0.5  # nats, see `agreement`

    def run(
        self,
        chunks: Sequence[torch.nn.Module],
        update: Update,
        *,
        progress: float = 0.0,
        forward_only: bool = False,
    ) -> Measured:
        """Sums over the whole update, as a whole and by position, and the values of its first `traced` tokens.

        Unless `forward_only`, the gradients of the update's mean loss are accumulated, reduced and normalised in
        `chunks` (the DDP wrappers). `progress` is how much of the training is done, 0 to 1. Collectives besides those
        of megatron's schedule: those of the objective a microbatch, 2 all-reduces of the sums and 2 of the maxima.
        """
        scale = update.scale

        def forward_step(inputs: Any, chunk: torch.nn.Module) -> tuple[Tensor, Any]:
            microbatch, *scored = next(inputs)
            hidden_T1H = packed_forward(
                chunk,
                microbatch.tokens_T,
                microbatch.position_ids_T,
                microbatch.cu_seqlens,
                microbatch.padding_T,
            )

            def loss_func(output_T1H: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
                loss_sum, sums, largest = self._loss(
                    output_T1H,
                    microbatch,
                    *scored,
                    progress=progress,
                    moved=update.moved,
                    traced=update.traced,
                )
                tokens = (~microbatch.padding_T).sum(dtype=torch.int)
                return loss_sum * (scale.tokens / scale.loss_tokens), tokens, (sums, largest)

            return hidden_T1H, loss_func

        logs = run_schedule(forward_step, update.rows(), chunks, self.groups, forward_only=forward_only)
        return self._reduce(logs, update.traced)

    def _loss(
        self,
        hidden_T1H: Tensor,
        microbatch: Microbatch,
        payload: TeacherPayload,
        old_logprob_N: Tensor | None,
        reference_logprob_N: Tensor | None,
        *,
        progress: float,
        moved: bool,
        traced: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss sum, what `_reduce` sums, `MAXIMA`) of one microbatch, on the last stage.

        Logits exist at response tokens only. Of several teachers the loss is the weighted sum of the losses with each
        of them alone, and so is every value of a token.
        """
        positions_N = microbatch.mask_T.nonzero()[:, 0]
        student = student_logits(
            self.gpt, hidden_T1H, positions_N, self.groups, chunked=self.head_chunk is not None
        )
        parts = payload.parts if isinstance(payload, Mixture) else (payload,)
        losses, values, sums = [], dict[str, Tensor](), dict[str, Tensor]()
        for part in parts:
            stats = self._token_stats(student, microbatch, part, positions_N, only=len(parts) == 1)
            loss, found = self.objective.loss(
                stats,
                positions_N,
                microbatch.mask_T,
                microbatch.cu_seqlens,
                rollout_logprob_N=microbatch.drawn_logprobs_T[positions_N],
                old_logprob_N=old_logprob_N,
                reference_logprob_N=reference_logprob_N,
                progress=progress,
                group=self.groups.cp,
            )
            losses.append(weight_of(part) * loss)
            add_values(values, found, part)
            sums |= own_sums(found, part, microbatch.mask_T)
        scored_N = stats.student_logprob if old_logprob_N is None and not moved else old_logprob_N
        drawn = self.objective.kept_ids_only
        rollout_T = microbatch.drawn_logprobs_T if drawn else microbatch.rollout_logprobs_T
        compared = agreement(scored_N, rollout_T[positions_N], self.mismatch_threshold)
        sums |= compared | {name: values[name].sum() for name in self.objective.value_names}
        nothing = values["loss"].new_zeros(())  # of a teacher that did not score this microbatch
        vectors = (
            torch.stack([sums.get(name, nothing) for name in self._sum_names]),
            self.positions.of(values, microbatch.place_T[positions_N], microbatch.length_T[positions_N]),
            token_trace(values, microbatch.number_T[positions_N], traced),
        )
        largest = torch.stack([compared[name] for name in MAXIMA])
        return torch.stack(losses).sum(), torch.cat(vectors), largest

    def _token_stats(
        self,
        student: Tensor | LinearLogits,
        microbatch: Microbatch,
        payload: TeacherPayload,
        positions_N: Tensor,
        *,
        only: bool,
    ) -> TokenStats:
        """The objective's statistics of each token, against one teacher; `only`: nothing else reads `student`.

        With `check`, UserError on every rank of a tensor-parallel group that meets NaN; the launcher ends the others.
        """
        chunked = self.head_chunk is not None
        try:
            return self.objective.token_stats(
                student,
                self.teacher.distribution(payload, chunked=chunked),
                microbatch.targets_T[positions_N],
                rollout_logprob_N=microbatch.drawn_logprobs_T[positions_N],
                vocab_size=self.vocab_size,
                group=self.groups.tp,
                check=self.check,
                inplace_backward=only,
                chunk_size=self.head_chunk,
                kept=microbatch.kept_N() if self.objective.kept_ids_only else None,
            )
        except FloatingPointError as error:
            raise UserError(
                f"objective.check: {error} of a microbatch; look at that model's weights"
            ) from None

    @property
    def positions(self) -> PositionSums:
        """What is summed by position."""
        return PositionSums(self.objective.value_names)

    @property
    def _sum_names(self) -> tuple[str, ...]:
        of_objective = self.objective.value_names
        return (*of_objective, *SUMS, *sum_names(self.teacher.names, of_objective))

    def _reduce(self, logs: list[tuple[Tensor, Tensor]], traced: int) -> Measured:
        """Sum the microbatches' statistics over pipeline stages (only the last has any) and data x context ranks.

        Of `MAXIMA` it is the largest.
        """
        names = self._sum_names
        sizes = [len(names), self.positions.size, trace_size(traced)]
        total = torch.zeros(sum(sizes), dtype=torch.float64, device=next(self.gpt.parameters()).device)
        largest = total.new_zeros(len(MAXIMA))
        for sums, maxima in logs:
            total += sums
            largest = largest.maximum(maxima)
        for group in (self.groups.pp, self.groups.dp_cp):
            dist.all_reduce(total, group=group)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        scalars, by_position, trace = total.cpu().split(sizes)
        values = (*scalars.tolist(), *largest.tolist())
        return Measured(dict(zip((*names, *MAXIMA), values, strict=True)), by_position, trace)


@dataclass(frozen=True)
class Outcome:
    """What an update came to: what `run` returns (None without tokens), gradient norm, whether it was applied."""

    measured: Measured | None
    grad_norm: float
    applied: bool


def means_over_tokens(outcomes: Sequence[Outcome], tokens: int) -> dict[str, float]:
    """Per-token means over several updates with `tokens` loss tokens together; empty where there are none.

    Those of `agreement` are over the tokens that could be compared, those of several teachers over their own.
    """
    with_tokens = [outcome.measured.sums for outcome in outcomes if outcome.measured is not None]
    others = {name for sums in with_tokens for name in sums if name in (*SUMS, *MAXIMA) or is_of_one(name)}
    names = [name for name in (with_tokens or [{}])[0] if name not in others]
    means = {name: sum(sums[name] for sums in with_tokens) / tokens for name in names}
    return means | per_teacher(with_tokens) | step_agreement(with_tokens)


def diagnostics_of(
    outcomes: Sequence[Outcome], updates: Sequence[Update], positions: PositionSums
) -> Diagnostics:
    """Of several updates together: everything by position, and the traces of their first rollouts."""
    measured = [outcome.measured for outcome in outcomes]
    found = [each.by_position for each in measured if each is not None]
    traces = []
    for each, update in zip(measured, updates, strict=True):
        trace = torch.zeros(trace_size(0)) if each is None else each.trace
        traces += traces_of(trace, positions.names, update.lengths)
    return Diagnostics(positions.row(torch.stack(found).sum(0)) if found else None, traces)


def student_logits(
    gpt: GPT, hidden_T1H: Tensor, positions_N: Tensor, groups: ProcessGroupCollection, *, chunked: bool
) -> Tensor | LinearLogits:
    """This rank's logits shard [N, V/TP] at the loss positions, computed here or, `chunked`, by the objective.

    Chunked, the head's gradient goes straight to megatron's float32 `main_grad`.
    """
    hidden_NH = select_positions(
        hidden_T1H, positions_N, group=groups.tp, sequence_parallel=gpt.config.sequence_parallel
    )
    if chunked:
        return LinearLogits(hidden_NH, gpt.head_weight, getattr(gpt.head_weight, "main_grad", None))
    return logits_shard(hidden_NH, gpt.head_weight, groups.tp)
