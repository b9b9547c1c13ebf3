"""Backward half of `vocab_parallel`: the gradient of one shard's logits from merged numbers, without collectives.

Shape suffixes: N tokens, V columns of the shard that belong to the real vocabulary, J ids per token whose
log-probabilities have a gradient (the target and the support), C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_opd.kernels import GradientRows, gradient
from megatron_opd.objectives.shard import Request, Shard


class Points(NamedTuple):
    """Single ids that gradients fall on: their columns in this shard (-1: another's) and the gradients.

    The columns of a token are distinct: where the target is one of the other ids, that id has both gradients.
    """

    columns_NJ: Tensor
    grad_NJ: Tensor

    @classmethod
    def of(
        cls,
        targets_N: Tensor | None,
        ids_NK: Tensor | None,
        target_grad_N: Tensor | None,
        ids_grad_NK: Tensor | None,
        shard: Shard,
        request: Request,
    ) -> Points | None:
        """None where no log-probability has a gradient."""
        parts = []
        if target_grad_N is not None and targets_N is not None:
            parts.append((targets_N[:, None], target_grad_N[:, None]))
        if ids_grad_NK is not None and ids_NK is not None:
            parts.append((ids_NK, ids_grad_NK.masked_fill(ids_NK < 0, 0.0)))
        if not parts:
            return None
        if len(parts) == 2:
            (target_N1, target_grad_N1), (others_NK, others_grad_NK) = parts
            same_NK = others_NK == target_N1
            inside_N1 = same_NK.any(1, keepdim=True)
            parts = [
                (target_N1.masked_fill(inside_N1, -1), target_grad_N1.masked_fill(inside_N1, 0.0)),
                (others_NK, others_grad_NK + target_grad_N1.where(same_NK, 0.0)),
            ]
        ids_NJ, grad_NJ = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return cls(shard.columns_of(ids_NJ), grad_NJ / request.temperature)


def gradient_rows(
    kind: str,
    divergence_grad_N: Tensor | None,
    points: Points | None,
    numbers: list[Tensor | None],
    request: Request,
) -> GradientRows:
    """The scales of `kernels.gradient`, with the incoming gradients, 1 / Z and 1 / temperature in them."""
    divergence_N, center_N, student_max_N, student_sum_N, teacher_max_N, teacher_sum_N = numbers
    assert student_max_N is not None and student_sum_N is not None
    rows = GradientRows(
        student_max_N,
        logprob_scale=None if points is None else points.grad_NJ.sum(1) / student_sum_N,
    )
    if divergence_grad_N is None:
        return rows
    assert divergence_N is not None and teacher_sum_N is not None
    # A token without a value must not get a gradient that looks sound.
    grad_N = (divergence_grad_N / request.temperature).where(~divergence_N.isnan(), torch.nan)
    if kind == "jsd":
        grad_N = grad_N * (1.0 - request.beta)
    return rows._replace(
        divergence_scale=grad_N / student_sum_N,
        teacher_max=teacher_max_N,
        center=center_N,
        teacher_scale=grad_N / teacher_sum_N,
        log_sum_ratio=student_sum_N.log() - teacher_sum_N.log(),
    )


def write_gradient(
    kind: str,
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    out_CV: Tensor,
    tokens: slice,
    rows: GradientRows,
    points: Points | None,
    shard: Shard,
    request: Request,
) -> None:
    """The complete gradient of a chunk of logits, written into out_CV, which may be student_CV."""
    columns = shard.columns
    here = rows.at(tokens)
    student_CV, padding = student_CV[:, :columns], out_CV[:, columns:]
    teacher_CV = None if teacher_CV is None else teacher_CV[:, :columns]
    options: dict[str, Any] = {"kind": kind, "rows": here, "temperature": request.temperature}
    options["beta"] = request.beta
    at_points = None
    if points is not None and columns > 0:
        columns_CJ, grad_CJ = points.columns_NJ[tokens], points.grad_NJ[tokens]
        at_CJ = columns_CJ.clamp(min=0)
        # Rounded once: in bf16, -p rounded and then + 1 would leave nothing of 1 - p. So these few columns are
        # computed apart, in full precision, before the logits are overwritten.
        at_points = torch.empty_like(grad_CJ)
        gradient(
            student_CV.gather(1, at_CJ).to(grad_CJ.dtype),
            None if teacher_CV is None else teacher_CV.gather(1, at_CJ).to(grad_CJ.dtype),
            out_NV=at_points,
            **options,
        )
        # Ids of other shards write column 0 what it has anyway.
        owned_CJ = columns_CJ >= 0
        first_C1 = grad_CJ.where(columns_CJ == 0, 0.0).sum(1, keepdim=True)
        at_points += grad_CJ.where(owned_CJ, first_C1)
    gradient(student_CV, teacher_CV, out_NV=out_CV[:, :columns], **options)
    if at_points is not None:
        # Not scatter_, which makes a float32 copy of the whole tensor when it is bf16 or fp16 on a CPU.
        tokens_C1 = torch.arange(at_CJ.shape[0], device=at_CJ.device)[:, None]
        out_CV[tokens_C1, at_CJ] = at_points.to(out_CV.dtype)
    padding.zero_()
