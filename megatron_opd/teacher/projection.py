"""The two ends of a Megatron teacher's payload: made of hidden states by its head, read as what the objective takes.

The ends may lie on different ranks, with the head cut in different ways: at the first `group` and `head_VD` are the
teacher's, at the second the student's. Shapes: N loss positions of a microbatch, D the teacher's hidden size, V padded
vocabulary, TP tensor-parallel size, W columns of a shard (V/TP), C positions of a chunk.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_opd.models.lm_head import logits_shard
from megatron_opd.objectives import LinearLogits, ServedLogprobs, served_logprobs
from megatron_opd.teacher.payload import HiddenStates, PayloadFormat, TeacherPayload, WholeLogits


@torch.no_grad()
def make_payload(
    form: PayloadFormat,
    hidden_ND: Tensor,
    targets_N: Tensor,
    head_WD: Tensor,
    group: dist.ProcessGroup,
    *,
    chunk_size: int | None = None,
) -> TeacherPayload:
    """The payload of these loss positions, the same on every rank of the tensor-parallel `group` that cuts the head.

    targets_N are the sampled ids. Of topk and sampled the logits of `chunk_size` positions exist at once (None: of
    all). Collectives over `group`: topk and sampled 1 all-gather, of 3 + 2 K numbers a position, logits 1 of the whole,
    hidden_states none.
    """
    if form.kind == "hidden_states":
        return HiddenStates(hidden_ND)
    if form.kind == "logits":
        return WholeLogits(_gathered(logits_shard(hidden_ND, head_WD, group), group, form.vocab_size))
    return served_logprobs(
        LinearLogits(hidden_ND, head_WD),
        targets_N,
        form.k if form.kind == "topk" else 0,
        temperature=form.temperature,
        vocab_size=form.vocab_size,
        group=group,
        chunk_size=chunk_size,
    )


def _gathered(logits_NW: Tensor, group: dist.ProcessGroup, vocab_size: int) -> Tensor:
    """[N, vocab_size] of all shards, without the ids that pad the vocabulary."""
    ranks, (tokens, width) = dist.get_world_size(group), logits_NW.shape
    if ranks == 1:
        return logits_NW[:, :vocab_size].contiguous()
    shards = logits_NW.new_empty(ranks, tokens, width)
    dist.all_gather_into_tensor(shards.view(ranks * tokens, width), logits_NW, group=group)
    return shards.transpose(0, 1).reshape(tokens, ranks * width)[:, :vocab_size].contiguous()


@torch.no_grad()
def distribution(
    payload: TeacherPayload,
    head_WD: Tensor | None,
    width: int,
    group: dist.ProcessGroup,
    *,
    chunked: bool,
) -> Tensor | LinearLogits | ServedLogprobs:
    """What the objective reads: logits [N, W] of this rank's ids, here or, `chunked`, later; or log-probs of ids.

    `width` is W, the rows of the student's shard of its head; `group` cuts it. head_WD, the teacher's head for the same
    ids, is read of hidden states only. No collectives.
    """
    if isinstance(payload, ServedLogprobs):
        return payload
    if isinstance(payload, WholeLogits):
        mine_NW = payload.logits_NV[:, dist.get_rank(group) * width :][:, :width]
        # Nothing reads the logits of ids that pad the vocabulary.
        return F.pad(mine_NW, (0, width - mine_NW.shape[1]))
    assert isinstance(payload, HiddenStates) and head_WD is not None
    if chunked:
        return LinearLogits(payload.hidden_ND, head_WD)
    return logits_shard(payload.hidden_ND, head_WD, group)
