"""The divergences from hidden states and LM-head shards: logits exist for one chunk of tokens at a time.

Statistics pass over all chunks -> ONE gather for all of them -> recompute pass in the backward. The price is the
two head products a second time: (4 + 2r) / (3 + r) of the matrix work of a head that keeps its logits, r the
ratio of teacher to student hidden size (1.5 at r = 1).

Shape suffixes: N tokens, D hidden size, V columns of the shard.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megatron_opd.objectives.divergence import full_support_stats, known_kind
from megatron_opd.objectives.kept_ids import KeptIds
from megatron_opd.objectives.logits import LinearLogits
from megatron_opd.objectives.shard import Request
from megatron_opd.objectives.stats import TokenStats

DEFAULT_CHUNK = 512


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    targets: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    entropies: bool = False,
    check: bool = False,
    chunk_size: int = DEFAULT_CHUNK,
    sequence_parallel: bool = False,
    weight_grad: Tensor | None = None,
    kept: KeptIds | None = None,
) -> TokenStats:
    """`vocab_parallel_divergence` of student_hidden @ student_weight.T and the teacher's; same options and values.

    Differentiable in student_hidden and student_weight, both gradients complete: that of the hidden states is
    summed over the vocabulary shards, that of the weight shard needs no sum. Sums over chunks are kept in float32
    at least; products are in the weight's dtype.

    Collectives over `group`: forward one all-gather of statistics for all chunks (jsd: two; with
    sequence_parallel one more, of the hidden states); backward one all-reduce [N, D_s] (with sequence_parallel
    one reduce-scatter). Saved: the four inputs, numbers of size [N], and with sequence_parallel the gathered
    hidden states [N, D_s]. Peak memory besides: two logits chunks [chunk_size, V/TP] and, where weight_grad is
    not given and the weight is not float32, its gradient in float32.

    Args:
        student_hidden: [N, D_s], the same on every rank; with sequence_parallel this rank's [N/TP, D_s], rank r
            holding tokens r * N/TP on.
        student_weight: [V/TP, D_s], this rank's rows of the LM head (or of the tied embedding).
        teacher_hidden: [N, D_t], whole on every rank, detached by nature; D_t may differ from D_s.
        teacher_weight: [V/TP, D_t], the rows of the same ids.
        chunk_size: tokens whose logits exist at once.
        sequence_parallel: student_hidden is sharded along the tokens over `group`.
        weight_grad: float32 buffer [V/TP, D_s] (Megatron's `main_grad`) that the backward pass adds the weight's
            gradient to, unrounded; autograd then sees a zero gradient for the weight, so that hooks still fire.
            It is added to in every backward pass through this call.
        kept: as `vocab_parallel_divergence`; the chunks are masked where they are.

    Raises:
        ValueError: as `vocab_parallel_divergence`; shapes of hidden states and heads that do not agree.
    """
    request = Request(
        kind=known_kind(kind),
        beta=beta,
        temperature=temperature,
        vocab_size=vocab_size,
        group=group,
        entropies=entropies,
        check=check,
        chunk_size=chunk_size,
        sequence_parallel=sequence_parallel,
        kept=kept,
    )
    student = LinearLogits(student_hidden, student_weight, weight_grad)
    return full_support_stats(student, LinearLogits(teacher_hidden, teacher_weight), targets, request)
