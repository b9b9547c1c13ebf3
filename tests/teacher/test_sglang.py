"""SGLangTeacher against a real server: its log-probs are the model's, however a response is cut into requests."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opd.data.loss_mask import LossMask
from megatron_opd.data.packing import Microbatch, pack
from megatron_opd.objectives import ServedLogprobs
from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.teacher.sglang import SGLangTeacher
from megatron_opd.teacher.teacher import Asked
from tests.gloo_pool import GlooPools
from tests.rollout.models import full_logits, load
from tests.sglang_server import SGLangServer
from tests.tiny import VOCAB, recorded_rollouts

MASKED = LossMask(token_ids=frozenset(range(40, 60)))  # leaves gaps in the responses


def microbatches() -> list[Microbatch]:
    """Several of them, with a prompt of one token, gaps in the loss, and the last id, which SGLang misreports."""
    first, *others = recorded_rollouts(9)
    first = replace(first, prompt_ids=[5], response_ids=[VOCAB - 1, *first.response_ids[1:]])
    return pack([first, *others], dp_size=1, token_budget=96, loss_mask=MASKED)[0]


def logprobs(folder: Path, packed: list[Microbatch]) -> list[Tensor]:
    """[N, V] of each microbatch by the training forward, one sequence at a time."""
    (model,), arch, _ = load(folder, ParallelLayout())
    found = []
    for microbatch in packed:
        offsets = microbatch.cu_seqlens.tolist()
        pieces = [
            full_logits(model, arch, microbatch.tokens_T[start:end].tolist())
            for start, end in pairwise(offsets)
        ]
        found.append(torch.cat(pieces)[microbatch.mask_T].log_softmax(-1))
    return found


def largest_errors(url: str, folder: Path, *, k: int, named: bool, request_tokens: int) -> dict[str, Any]:
    """Of the payloads of a teacher against the training forward; `named`: log-probs of ids that are given."""
    packed = microbatches()
    truth = logprobs(folder, packed)
    _, arch, groups = load(folder, ParallelLayout())
    generator = torch.Generator().manual_seed(1)
    given = [torch.rand(each.shape, generator=generator).argsort(1)[:, :5] for each in truth]
    teacher = SGLangTeacher(groups, vocab_size=arch.vocab_size, k=k, request_tokens=request_tokens)
    teacher.connect([url], concurrency=16)
    payloads = teacher.score(Asked(packed, student_ids=(lambda: given) if named else None))
    sampled = teacher.score(Asked(packed, evaluation=True))
    teacher.close()
    errors: dict[str, Any] = {
        "sampled": 0.0,
        "support": 0.0,
        "same ids": True,
        "shapes": set(),
        "bytes": set(),
    }
    for payload, alone, full_NV, microbatch, ids_NK in zip(
        payloads, sampled, truth, packed, given, strict=True
    ):
        assert isinstance(payload, ServedLogprobs) and isinstance(alone, ServedLogprobs)
        assert alone.ids is None and torch.allclose(alone.logprob, payload.logprob, atol=1e-5)
        targets_N1 = microbatch.targets_T[microbatch.mask_T][:, None]
        gap = (payload.logprob - full_NV.gather(1, targets_N1)[:, 0]).abs().max()
        errors["sampled"] = max(errors["sampled"], float(gap))
        parts = [part for part in vars(payload).values() if part is not None]
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
        errors["bytes"].add(sum(storages.values()) / len(payload.logprob))
        if payload.ids is None or payload.ids_logprob is None:
            continue
        expected = ids_NK if named else full_NV.topk(k).indices
        errors["same ids"] &= torch.equal(payload.ids, expected)
        gap = (payload.ids_logprob - full_NV.gather(1, expected)).abs().max()
        errors["support"] = max(errors["support"], float(gap))
        errors["shapes"].add(payload.ids.shape[1])
    return errors


@pytest.mark.parametrize("request_tokens", [2048, 7])
@pytest.mark.parametrize(("k", "named"), [(0, False), (6, False), (0, True)])
def test_the_training_forwards_logprobs(
    gloo: GlooPools, sglang: SGLangServer, k: int, named: bool, request_tokens: int
) -> None:
    (errors,) = gloo(
        1, largest_errors, sglang.url, sglang.models[0], k=k, named=named, request_tokens=request_tokens
    )
    assert errors["sampled"] < 1e-5 and errors["support"] < 1e-5 and errors["same ids"]
    ids = 5 if named else k
    assert errors["shapes"] == ({ids} if ids else set())
    assert errors["bytes"] == {4 + 12 * ids}, "as the plan has it"
