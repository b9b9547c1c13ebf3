"""Forward half of `vocab_parallel`: one pass over each shard, one gather, what they say of the whole vocabulary.

Shape suffixes: N tokens, V columns of the shard that belong to the real vocabulary, R ranks of the group, K ids
of a support, C tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_opd.kernels import jsd_statistics, statistic_names, statistics
from megatron_opd.objectives.candidates import best_of_shards, top_columns
from megatron_opd.objectives.logits import LogitsPair
from megatron_opd.objectives.merge import Merged, gather_shards
from megatron_opd.objectives.shard import Request, Shard

SUPPORT_ROWS = ("scores", "ids", "others", "student_ids", "teacher_ids")


def whole_statistics(
    models: LogitsPair, targets_N: Tensor | None, ids_NK: Tensor | None, shard: Shard, request: Request
) -> dict[str, Tensor]:
    """Name -> [R, N], or [R, K, N] for SUPPORT_ROWS: the one pass and the one gather."""
    layout = _layout(models, targets_N, ids_NK, shard, request)
    parts = []
    for tokens, student_CV, teacher_CV in models.chunks(request.chunk_size):
        logits = {"student": student_CV[:, : shard.columns]}
        if teacher_CV is not None:
            logits["teacher"] = teacher_CV[:, : shard.columns]
        parts.append(_chunk_statistics(logits, targets_N, ids_NK, tokens, shard, request))
    packed = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    gathered = gather_shards(packed.contiguous(), request.group)
    pieces = gathered.split(list(layout.values()), dim=1)
    return {
        name: piece if name in SUPPORT_ROWS else piece[:, 0]
        for name, piece in zip(layout, pieces, strict=True)
    }


def _layout(
    pair: LogitsPair, targets_N: Tensor | None, ids_NK: Tensor | None, shard: Shard, request: Request
) -> dict[str, int]:
    """Name -> number of rows, in the order of `_chunk_statistics`."""
    models = ("student",) if pair.teacher is None else ("student", "teacher")
    names = statistic_names(
        teacher=pair.teacher is not None,
        forward_cross=request.kind == "forward_kl",
        entropies=request.entropies,
    )
    layout = dict.fromkeys(names, 1)
    if targets_N is not None:
        layout |= {f"{model}_target": 1 for model in models}
    if request.best_of:
        found = ("scores", "ids", *(["others"] if pair.teacher is not None else []))
        layout |= dict.fromkeys(found, min(request.k, shard.vocab_size))
    elif ids_NK is not None:
        layout |= {f"{model}_ids": ids_NK.shape[1] for model in models}
    return layout


def _chunk_statistics(
    logits: dict[str, Tensor],
    targets_N: Tensor | None,
    ids_NK: Tensor | None,
    tokens: slice,
    shard: Shard,
    request: Request,
) -> Tensor:
    """The rows of `_layout` for these tokens, [rows, C]."""
    packed = statistics(
        logits["student"],
        logits.get("teacher"),
        temperature=request.temperature,
        forward_cross=request.kind == "forward_kl",
        entropies=request.entropies,
    )
    at_ids = []
    if targets_N is not None:
        columns_C1 = shard.columns_of(targets_N[tokens])[:, None]
        at_ids += [_at_columns(model, columns_C1, packed.dtype) for model in logits.values()]
    if request.best_of:
        at_ids += _candidates(logits, request, shard, packed.dtype)
    elif ids_NK is not None:
        columns_CK = shard.columns_of(ids_NK[tokens])
        at_ids += [_at_columns(model, columns_CK, packed.dtype) for model in logits.values()]
    for values in at_ids:
        if values.is_floating_point():  # logits, not ids
            values.div_(request.temperature)
    return torch.cat([packed, *(values.t().to(packed.dtype) for values in at_ids)])


def _candidates(
    logits: dict[str, Tensor], request: Request, shard: Shard, dtype: torch.dtype
) -> list[Tensor]:
    """This shard's k best ids: [their scores, the ids, the other model's logits if there is one], [C, k] each."""
    assert request.best_of is not None
    scores_CV = logits[request.best_of]
    other = "student" if request.best_of == "teacher" else "teacher"
    k, local = min(request.k, shard.vocab_size), min(request.k, shard.columns)
    columns_CK = torch.full((scores_CV.shape[0], k), -1, device=scores_CV.device)
    if local > 0:
        columns_CK[:, :local] = top_columns(scores_CV, local)
    scores_CK = _at_columns(scores_CV, columns_CK, dtype)
    found = [scores_CK, columns_CK + shard.start]
    return found if other not in logits else [*found, _at_columns(logits[other], columns_CK, dtype)]


def _at_columns(logits_CV: Tensor, columns_CJ: Tensor, dtype: torch.dtype) -> Tensor:
    """The logits in these columns, [C, J]; -inf where the column is -1."""
    if logits_CV.shape[1] == 0:
        return logits_CV.new_full(columns_CJ.shape, -torch.inf, dtype=dtype)
    return logits_CV.gather(1, columns_CJ.clamp(min=0)).to(dtype).where(columns_CJ >= 0, -torch.inf)


def support_of(
    rows: dict[str, Tensor], ids_NK: Tensor | None, request: Request
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The ids of the support and both models' logits there, [K, N]."""
    if request.best_of:
        ids_NK, scores_NK, others_NK = best_of_shards(
            rows["scores"], rows["ids"], rows.get("others"), request.k
        )
        scores_KN, others_KN = scores_NK.t(), None if others_NK is None else others_NK.t()
        if request.best_of == "student":
            return ids_NK, scores_KN, others_KN
        return ids_NK, others_KN, scores_KN
    if ids_NK is None:
        return None, None, None
    teacher_ids_KN = rows["teacher_ids"].amax(0) if "teacher_ids" in rows else None
    return ids_NK, rows["student_ids"].amax(0), teacher_ids_KN


def divergence_of(
    models: LogitsPair, merged: Merged, shard: Shard, request: Request
) -> tuple[Tensor | None, Tensor | None]:
    """The divergence [N] and what its gradient subtracts. For jsd: a second pass and a second gather."""
    if request.kind == "logprob":
        return None, None
    if request.kind == "reverse_kl":
        assert merged.reverse_kl is not None
        # A copy: reverse_kl is handed out as a constant beside the differentiable divergence.
        return merged.reverse_kl.clone(), merged.mean_gap
    if request.kind == "forward_kl":
        return merged.forward_kl, None
    assert merged.teacher_max is not None and merged.teacher_sum is not None
    log_sum_ratio_N = merged.student_sum.log() - merged.teacher_sum.log()
    parts = []
    for tokens, student_CV, teacher_CV in models.chunks(request.chunk_size):
        assert teacher_CV is not None
        sums = jsd_statistics(
            student_CV[:, : shard.columns],
            teacher_CV[:, : shard.columns],
            student_max_N=merged.student_max[tokens],
            teacher_max_N=merged.teacher_max[tokens],
            log_sum_ratio_N=log_sum_ratio_N[tokens],
            beta=request.beta,
            temperature=request.temperature,
        )
        parts.append(sums)
    totals = gather_shards(torch.cat(parts, dim=1), request.group).sum(0)
    student_N, teacher_N = totals[0] / merged.student_sum, totals[1] / merged.teacher_sum
    return request.beta * teacher_N + (1.0 - request.beta) * student_N, student_N
