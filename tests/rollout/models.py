"""What the rollout tests run on every rank: the engine at a layout, and the plain reference it has to equal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opd.checkpoint.weights import load_model_weights
from megatron_opd.data.prompts import Prompt
from megatron_opd.data.rollouts import Rollout
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import Architecture, read_architecture
from megatron_opd.models.gpt import GPT, build_gpt, packed_forward
from megatron_opd.models.lm_head import logits_shard
from megatron_opd.parallel import cpu
from megatron_opd.parallel.groups import ParallelLayout, build_groups
from megatron_opd.rollout.local import LocalEngine
from megatron_opd.rollout.sampling import Sampling, uniforms
from megatron_opd.rollout.sharded import RolloutsStopped, generate_sharded

LENGTHS = (5, 9, 1, 7)
PROMPTS = [
    Prompt(id=f"{row}@0", token_ids=[(17 * row + 5 * i + 1) % 131 for i in range(length)], text="")
    for row, length in enumerate(LENGTHS)
]


def load(
    folder: Path, layout: ParallelLayout, precision: str = "fp32"
) -> tuple[list[GPT], Architecture, Any]:
    """This rank's chunks of the folder's model, its architecture and its groups."""
    cpu.install()
    groups = build_groups(layout)
    arch = read_architecture(folder)
    padded = arch.padded_vocab_size(layout.tensor)
    chunks = build_gpt(arch, layout, groups, precision=precision, padded_vocab_size=padded)
    load_model_weights(chunks, arch, folder, groups=groups, padded_vocab_size=padded)
    return chunks, arch, groups


def generate(
    folder: Path,
    sampling: Sampling,
    prompts: Sequence[Prompt] = PROMPTS,
    layout: ParallelLayout = ParallelLayout(),  # noqa: B008
    *,
    precision: str = "fp32",
    max_batch: int | None = None,
) -> list[Rollout]:
    """All rollouts, as every rank of the layout gets them."""
    chunks, arch, groups = load(folder, layout, precision)
    engine = LocalEngine(chunks, arch, groups, max_batch=max_batch)
    return generate_sharded(engine, prompts, sampling, weight_version=3, group=groups.dp_cp)


def full_logits(model: GPT, arch: Architecture, tokens: list[int]) -> torch.Tensor:
    """The training forward's logits [T, V] of one sequence, without the vocabulary's padding."""
    with torch.no_grad():
        offsets = torch.tensor([0, len(tokens)], dtype=torch.int32)
        hidden = packed_forward(model, torch.tensor(tokens), torch.arange(len(tokens)), offsets)
        return logits_shard(hidden[:, 0], model.head_weight, model.pg_collection.tp)[:, : arch.vocab_size]


def reference(folder: Path, sampling: Sampling, precision: str = "fp32") -> list[Rollout]:
    """`PROMPTS` by the training forward over the whole sequence for every token, inverse CDF written plainly."""
    (model,), arch, _ = load(folder, ParallelLayout(), precision)
    rollouts = []
    for prompt in PROMPTS:
        for sample in range(sampling.n):
            noise = uniforms(sampling.seed, prompt.id, sample, sampling.max_new_tokens)
            ids: list[int] = []
            logprobs: list[float] = []
            while len(ids) < sampling.max_new_tokens and not (ids and ids[-1] in sampling.stop_ids):
                logits = full_logits(model, arch, prompt.token_ids + ids)[-1].double()
                if sampling.temperature == 0:
                    token = int(logits.argmax())
                else:
                    logits = logits / sampling.temperature
                    exceeds = logits.softmax(-1).cumsum(-1) > noise[len(ids)]
                    token = int(exceeds.nonzero()[0])
                ids.append(token)
                logprobs.append(float(logits.log_softmax(-1)[token]))
            reason = "stop" if ids[-1] in sampling.stop_ids else "length"
            rollouts.append(Rollout(prompt.id, sample, prompt.token_ids, ids, logprobs, reason, 3))
    return rollouts


def error_of_diverged(folder: Path, sampling: Sampling, layout: ParallelLayout) -> str:
    """What the engine says on this rank when the weights of one rank of the last stage are NaN."""
    chunks, arch, groups = load(folder, layout)
    if groups.pp.rank() == layout.pipeline - 1 and groups.tp.rank() == layout.tensor - 1:
        with torch.no_grad():
            chunks[-1].head_weight.fill_(torch.nan)
    with pytest.raises(UserError) as caught:
        LocalEngine(chunks, arch, groups).generate(PROMPTS, sampling, 3)
    return str(caught.value)


def stopped_on_the_last_rank(folder: Path, sampling: Sampling, layout: ParallelLayout) -> int:
    """How often this rank was asked, when the last rank of the layout is told to stop at the fourth token."""
    chunks, arch, groups = load(folder, layout)
    asked = 0

    def stopped() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3 and groups.dp_cp.rank() == groups.dp_cp.size() - 1

    engine = LocalEngine(chunks, arch, groups, stopped=stopped)
    with pytest.raises(RolloutsStopped):
        generate_sharded(engine, PROMPTS, sampling, weight_version=3, group=groups.dp_cp)
    return asked


def generate_twice(folder: Path, sampling: Sampling) -> tuple[list[Rollout], list[Rollout], bool]:
    """(before, after the weights changed in place, whether training flags are kept)."""
    (model,), arch, groups = load(folder, ParallelLayout())
    model.train()
    model.decoder.layers[1].eval()
    modes = [module.training for module in model.modules()]
    engine = LocalEngine([model], arch, groups)
    before = engine.generate(PROMPTS, sampling, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = engine.generate(PROMPTS, sampling, 4)
    return before, after, modes == [module.training for module in model.modules()]


def training_logprobs(folder: Path, rollouts: list[Rollout], precision: str) -> list[list[float]]:
    """Log-probs of the responses by the training forward, at temperature 1."""
    (model,), arch, _ = load(folder, ParallelLayout(), precision)
    result = []
    for rollout in rollouts:
        logits = full_logits(model, arch, rollout.prompt_ids + rollout.response_ids[:-1])
        chosen = logits[len(rollout.prompt_ids) - 1 :].float().log_softmax(-1)
        ids = torch.tensor(rollout.response_ids)
        result.append(chosen.gather(1, ids[:, None])[:, 0].tolist())
    return result


def assert_cut_as_training(
    folder: Path, sampling: Sampling, rollouts: list[Rollout], tolerance: float
) -> None:
    """Kept ids and both log-probs of every token are those of the training forward's softmax, cut in float64.

    An id within the tolerance of the edge may be kept or not.
    """
    (model,), arch, _ = load(folder, ParallelLayout())
    for rollout in rollouts:
        logits = full_logits(model, arch, rollout.prompt_ids + rollout.response_ids[:-1])
        probs_TV = (logits[len(rollout.prompt_ids) - 1 :].double() / sampling.temperature).softmax(-1)
        assert len(rollout.kept_ids) == len(rollout.response_ids) == len(rollout.drawn_logprobs)
        for place, (kept, token) in enumerate(
            zip(rollout.kept_ids.lists(), rollout.response_ids, strict=True)
        ):
            probs, order = probs_TV[place].sort(descending=True)
            rank, before = torch.arange(len(probs)), probs.cumsum(0) - probs
            inside = (rank < (sampling.top_k or len(probs))) & (before < sampling.top_p)
            last = int(inside.sum()) - 1
            near = (before - sampling.top_p).abs() < tolerance
            if sampling.top_k:  # or as likely as the first or last of the other side
                near |= (rank >= last) & (rank <= last + 1) & (probs[last] - probs[last + 1] < tolerance)
            surely, perhaps = (set(order[each].tolist()) for each in (inside & ~near, inside | near))
            assert len(set(kept)) == len(kept) and surely <= set(kept) <= perhaps
            logprob = float(probs_TV[place, token].log())
            assert rollout.logprobs[place] == pytest.approx(logprob, abs=tolerance)
            drawn = logprob - float(probs_TV[place, kept].sum().log())
            assert rollout.drawn_logprobs[place] == pytest.approx(drawn, abs=tolerance)


def generate_cut_as_training(folder: Path, sampling: Sampling, layout: ParallelLayout) -> int:
    """Draws in this layout, and on one rank checks what was drawn; returns the ids kept of all tokens."""
    rollouts = generate(folder, sampling, layout=layout)
    if layout.world_size == 1:
        assert_cut_as_training(folder, sampling, rollouts, 1e-5)
    return sum(len(rollout.kept_ids.ids_E) for rollout in rollouts)
