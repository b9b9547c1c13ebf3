"""`LocalEngine`: responses drawn on the training ranks, with the training model's own weights.

A batched decoding loop with cached keys and values in the layout of the training. Tensor- and pipeline-parallel ranks
together are a replica; every context- or data-parallel rank has its own. One rank of a replica (the first
tensor-parallel rank of the last stage) draws the tokens and tells the others, so that they cannot disagree.

Shapes: B sequences in the batch, N tokens of a pass, H hidden size, V padded vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_opd.data.prompts import Prompt
from megatron_opd.data.rollouts import Rollout
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import Architecture
from megatron_opd.models.gpt import GPT
from megatron_opd.objectives.kept_ids import KeptIds
from megatron_opd.rollout.decoder import StageDecoder
from megatron_opd.rollout.kv_cache import KVCache
from megatron_opd.rollout.sampling import (
    NOT_DRAWN,
    STOPPED,
    Draws,
    Sampling,
    sample_tokens,
    stopped_draws,
    uniforms,
)
from megatron_opd.rollout.sharded import RolloutsStopped, never

PROMPT_TOKENS = 8192  # prompt tokens in one pass: bounds the activations, not the cache


@dataclass
class _Sequence:
    """One response while it is drawn."""

    prompt: Prompt
    sample: int
    noise: np.ndarray  # [max_new_tokens]
    response_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    drawn_logprobs: list[float] = field(default_factory=list)
    kept_ids: list[Tensor] = field(default_factory=list)  # of every token, where they are recorded
    finish_reason: str = ""  # empty while it runs

    def append(self, draw: "_Draw", sampling: Sampling) -> None:
        token = draw.token
        self.response_ids.append(token)
        self.logprobs.append(draw.logprob)
        self.drawn_logprobs.append(draw.drawn_logprob)
        if draw.kept_ids is not None:
            self.kept_ids.append(draw.kept_ids)
        if token in sampling.stop_ids:
            self.finish_reason = "stop"
        elif len(self.response_ids) == sampling.max_new_tokens:
            self.finish_reason = "length"


class _Draw(NamedTuple):
    """The next token of a row."""

    token: int
    logprob: float
    drawn_logprob: float
    kept_ids: Tensor | None


class LocalEngine:
    """Draws responses with the weights that `chunks` (this rank's part of the model) have at the time of the call.

    Tokens of `arch.vocab_size` and more are never drawn. At most `max_batch` sequences are decoded together (None: all
    of a call); the cache of keys and values grows with it. The rank that draws asks `stopped` before every token: once
    it says yes, `generate` raises RolloutsStopped.
    """

    def __init__(
        self,
        chunks: Sequence[GPT],
        arch: Architecture,
        groups: ProcessGroupCollection,
        *,
        max_batch: int | None = None,
        stopped: Callable[[], bool] = never,
    ) -> None:
        assert max_batch is None or max_batch > 0
        self._chunks, self._arch, self._groups, self._max_batch = chunks, arch, groups, max_batch
        self._stopped = stopped

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, weight_version: int) -> list[Rollout]:
        """`sampling.n` responses to each prompt of this replica, in prompt order, then sample order.

        Collective over the replica: all its ranks call it with the same arguments and return the same list. With
        expert parallelism it begins with a collective over these ranks, so every replica calls it, even without
        prompts. Raises UserError, on all ranks of the replica, when the logits are not finite, and RolloutsStopped.
        """
        if not prompts and self._groups.ep.size() == 1:
            return []
        rows = len(prompts) * sampling.n
        step = max(min(self._max_batch or rows, rows), 1)
        decoder = StageDecoder(self._chunks, self._arch, self._groups, rows=step)
        keys = [(prompt, sample) for prompt in prompts for sample in range(sampling.n)]
        rollouts: list[Rollout] = []
        for start in range(0, rows, step):
            batch = [
                _Sequence(prompt, sample, uniforms(sampling.seed, prompt.id, sample, sampling.max_new_tokens))
                for prompt, sample in keys[start : start + step]
            ]
            _Generation(decoder, self._arch, self._groups, batch, sampling, self._stopped).run()
            rollouts += [_to_rollout(sequence, weight_version) for sequence in batch]
        return rollouts


class _Generation:
    """One batch from its prompts to the last token."""

    def __init__(
        self,
        decoder: StageDecoder,
        arch: Architecture,
        groups: ProcessGroupCollection,
        batch: list[_Sequence],
        sampling: Sampling,
        stopped: Callable[[], bool],
    ) -> None:
        assert all(sequence.prompt.token_ids for sequence in batch), "a prompt has at least one token"
        self.decoder, self.arch, self.sampling, self.stopped = decoder, arch, sampling, stopped
        self.stages = _Stages(groups, arch.hidden_size, decoder.device)
        self.rows = batch  # the sequence of every row of the cache
        lengths = [len(sequence.prompt.token_ids) for sequence in batch]
        self.positions = torch.tensor(lengths, device=decoder.device)  # of the row's next token
        self.cos, self.sin = decoder.rope(max(lengths) + sampling.max_new_tokens)
        self.cache = KVCache(
            lengths,
            sampling.max_new_tokens - 1,  # the last token is never an input
            layers=len(decoder.layers),
            groups=decoder.groups,
            head_dim=decoder.head_dim,
            dtype=decoder.dtype,
            device=decoder.device,
        )

    def run(self) -> None:
        """Draw until every sequence has ended."""
        residual_BH = self._run_prompts()
        for position in range(self.sampling.max_new_tokens):
            draws = self._draw(residual_BH, position)
            for sequence, draw in zip(self.rows, draws, strict=True):
                if not sequence.finish_reason:
                    sequence.append(draw, self.sampling)
            tokens = [draw.token for draw in draws]
            running = [row for row, sequence in enumerate(self.rows) if not sequence.finish_reason]
            if not running:
                return
            if 2 * len(running) <= len(self.rows):  # a row costs little beside reading the weights
                tokens = self._keep(running, tokens)
            residual_BH = self._run_next(tokens)

    def _keep(self, running: list[int], tokens: list[int]) -> list[int]:
        self.cache.keep(running)
        self.rows = [self.rows[row] for row in running]
        self.positions = self.positions[running]
        return [tokens[row] for row in running]

    def _run_next(self, tokens: list[int]) -> Tensor:
        """The residual stream [B, H] after this stage at one new token a row."""
        rope = self.cos[self.positions], self.sin[self.positions]

        def run(chunk: int, residual_BH: Tensor) -> Tensor:
            return self.decoder.run_next(chunk, residual_BH, rope, self.cache)

        residual_BH = self._through_chunks(tokens, run)
        self.positions = self.positions + 1
        self.cache.advance()
        return residual_BH

    def _run_prompts(self) -> Tensor:
        """The residual stream [B, H] after this stage at every prompt's last token; fills the cache.

        The samples of a prompt share its pass.
        """
        rows_of_prompts = [
            [row for row, _ in members]
            for _, members in groupby(enumerate(self.rows), key=lambda item: id(item[1].prompt))
        ]
        last_BH = [self._run_prompt_group(group) for group in _split_by_tokens(rows_of_prompts, self.rows)]
        return torch.cat(last_BH)

    def _run_prompt_group(self, rows_of_prompts: list[list[int]]) -> Tensor:
        """One packed pass over some prompts, given by the rows of their samples."""
        prompts = [self.rows[rows[0]].prompt.token_ids for rows in rows_of_prompts]
        lengths = [len(prompt) for prompt in prompts]
        starts = np.cumsum([0, *lengths])
        index = [
            (start + offset, row, slot)
            for start, rows in zip(starts, rows_of_prompts, strict=False)
            for row in rows
            for offset, slot in enumerate(self.cache.slots(row))
        ]
        token_N, row_N, slot_N = torch.tensor(np.array(index), device=self.decoder.device).unbind(1)

        def store(layer: int, key_NGD: Tensor, value_NGD: Tensor) -> None:
            self.cache.write_prompts(layer, row_N, slot_N, key_NGD[token_N], value_NGD[token_N])

        positions_N = torch.cat([torch.arange(length) for length in lengths]).to(self.decoder.device)
        rope = self.cos[positions_N], self.sin[positions_N]

        def run(chunk: int, residual_NH: Tensor) -> Tensor:
            return self.decoder.run_prompts(chunk, residual_NH, rope, lengths, store)

        residual_NH = self._through_chunks([token for prompt in prompts for token in prompt], run)
        ends = [int(end) - 1 for end, rows in zip(starts[1:], rows_of_prompts, strict=True) for _ in rows]
        return residual_NH[torch.tensor(ends, device=self.decoder.device)]

    def _through_chunks(self, tokens: list[int], run: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The residual stream [N, H] after this rank's last chunk; `run` takes it through one, from its entrance."""
        for chunk in range(self.decoder.chunks):
            if self.stages.first and chunk == 0:
                residual_NH = self.decoder.embed(torch.tensor(tokens, device=self.decoder.device))
            else:
                residual_NH = self.stages.receive(len(tokens))
            residual_NH = run(chunk, residual_NH)
            if not (self.stages.last and chunk == self.decoder.chunks - 1):
                self.stages.pass_on(residual_NH)
        return residual_NH

    def _draw(self, residual_BH: Tensor, position: int) -> list[_Draw]:
        """One token a row, the same on every rank of the replica.

        Only one rank sees all logits, so every rank learns from what it shares that they were not finite, and that the
        run is to stop.
        """
        drawn: Draws | None = None
        logits_BV = None
        if self.stages.last:
            logits_BV = self.stages.gather_logits(self.decoder.logits_shard(residual_BH))
        if logits_BV is not None:
            noise = np.array([sequence.noise[position] for sequence in self.rows])
            uniform_B = torch.from_numpy(noise).to(logits_BV.device)
            drawn = (
                stopped_draws(logits_BV)
                if self.stopped()
                else sample_tokens(logits_BV, uniform_B, self.sampling, self.arch.vocab_size)
            )
        tokens, logprobs, drawn_logprobs = self.stages.share_draws(drawn, len(self.rows)).tolist()
        if tokens[0] == NOT_DRAWN:
            raise UserError(
                "the student's logits are NaN or infinite: its weights have diverged; remove the newest of run_dir's "
                "checkpoints, lower optimizer.lr and start again"
            )
        if tokens[0] == STOPPED:
            raise RolloutsStopped
        kept_ids: Sequence[Tensor | None] = [None] * len(tokens)
        if self.sampling.cuts and self.sampling.keep_ids:
            kept_ids = self.stages.share_kept(None if drawn is None else drawn.kept, len(tokens))
        rows = zip(tokens, logprobs, drawn_logprobs, kept_ids, strict=True)
        return [_Draw(int(token), *others) for token, *others in rows]


class _Stages:
    """What the ranks of a replica tell each other: the residual stream, logits shards and the drawn tokens."""

    def __init__(self, groups: ProcessGroupCollection, hidden_size: int, device: torch.device) -> None:
        self._tp, self._pp, self._mp = groups.tp, groups.pp, groups.mp
        self._hidden_size, self._device = hidden_size, device
        self._stage_ranks = dist.get_process_group_ranks(groups.pp)
        self.first = groups.pp.rank() == 0
        self.last = groups.pp.rank() == groups.pp.size() - 1
        replica = dist.get_process_group_ranks(groups.mp)  # tensor-parallel rank fastest
        self._drawing_rank = replica[-groups.tp.size()]

    def receive(self, count: int) -> Tensor:
        """The residual stream [count, H] of the stage before (the last before the first), float32. 1 receive."""
        residual_NH = torch.empty(count, self._hidden_size, device=self._device)
        dist.recv(residual_NH, self._stage_ranks[self._pp.rank() - 1], group=self._pp)
        return residual_NH

    def pass_on(self, residual_NH: Tensor) -> None:
        """Hand the residual stream to the next stage, after the last to the first. 1 send."""
        following = self._stage_ranks[(self._pp.rank() + 1) % self._pp.size()]
        dist.send(residual_NH.contiguous(), following, group=self._pp)

    def gather_logits(self, shard: Tensor) -> Tensor | None:
        """All logits [B, V] on the rank that draws, None on the others. 1 gather under tensor parallelism."""
        if self._tp.size() == 1:
            return shard
        draws = dist.get_rank() == self._drawing_rank
        shards = [torch.empty_like(shard) for _ in range(self._tp.size())] if draws else None
        dist.gather(shard, shards, dst=self._drawing_rank, group=self._tp)
        return None if shards is None else torch.cat(shards, 1)

    def share_draws(self, drawn: Draws | None, count: int) -> Tensor:
        """Ids, log-probs and drawn log-probs [3, B] as float64, from the rank that has them.

        1 broadcast in a replica of several ranks.
        """
        if drawn is None:
            drawn_3B = torch.empty(3, count, dtype=torch.float64, device=self._device)
        else:
            drawn_3B = torch.stack([values_B.double() for values_B in drawn[:3]])
        if self._mp.size() > 1:
            dist.broadcast(drawn_3B, self._drawing_rank, group=self._mp)
        return drawn_3B

    def share_kept(self, kept: KeptIds | None, count: int) -> Sequence[Tensor]:
        """The kept ids of each row on the CPU, int32, from the rank that has them. 2 broadcasts, or none, as above."""
        counts_B = torch.empty(count, dtype=torch.int64) if kept is None else kept.counts_N
        counts_B = counts_B.to(self._device)
        if self._mp.size() > 1:
            dist.broadcast(counts_B, self._drawing_rank, group=self._mp)
        counts = counts_B.tolist()
        ids_E = (
            torch.empty(sum(counts), dtype=torch.int32, device=self._device) if kept is None else kept.ids_E
        )
        if self._mp.size() > 1:
            dist.broadcast(ids_E, self._drawing_rank, group=self._mp)
        return ids_E.cpu().split(counts)


def _split_by_tokens(
    rows_of_prompts: Iterable[list[int]], rows: list[_Sequence]
) -> Iterator[list[list[int]]]:
    """Consecutive prompts in groups of at most PROMPT_TOKENS tokens (a longer prompt alone)."""
    group: list[list[int]] = []
    total = 0
    for members in rows_of_prompts:
        length = len(rows[members[0]].prompt.token_ids)
        if group and total + length > PROMPT_TOKENS:
            yield group
            group, total = [], 0
        group.append(members)
        total += length
    yield group


def _to_rollout(sequence: _Sequence, weight_version: int) -> Rollout:
    return Rollout(
        prompt_id=sequence.prompt.id,
        sample=sequence.sample,
        prompt_ids=list(sequence.prompt.token_ids),
        response_ids=sequence.response_ids,
        logprobs=sequence.logprobs,
        drawn_logprobs=sequence.drawn_logprobs,
        kept_ids=KeptIds.of(sequence.kept_ids),
        finish_reason=sequence.finish_reason,
        weight_version=weight_version,
        teacher_prompt_ids=sequence.prompt.teacher_ids,
        route=sequence.prompt.route,
    )
