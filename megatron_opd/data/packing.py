"""Packs rollouts into microbatches of fixed token budget, balanced over the data-parallel ranks.

A rollout becomes one segment of `prompt + response[:-1]`: the last response token predicts nothing, so it is
never an input. Targets are shifted inside each segment before packing; slicing for context parallelism comes
later (`Microbatch.shard`) and needs no look at a neighbour. Shapes: T tokens of a microbatch (all segments with
their padding) or of a context-parallel rank's share of it, S segments.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_opd.data.loss_mask import LossMask
from megatron_opd.data.rollouts import Rollout
from megatron_opd.errors import UserError
from megatron_opd.objectives.context_parallel import zigzag_positions
from megatron_opd.objectives.kept_ids import KeptIds


@dataclass(frozen=True)
class Microbatch:
    """Packed (THD) input of one forward pass.

    A microbatch without rollouts has one segment of padding and a mask that is False everywhere. A share of a
    microbatch (`shard`) keeps the offsets of the whole.
    """

    tokens_T: Tensor  # int64
    position_ids_T: Tensor  # int64, restart at 0 in every segment
    targets_T: Tensor  # int64: the token that position t predicts; 0 where mask_T is False
    mask_T: Tensor  # bool: position predicts a response token that enters the loss
    padding_T: Tensor  # bool: fills up its segment; it is computed, but counts nowhere
    rollout_logprobs_T: Tensor  # float32: the engine's log-prob of targets_T (nats); 0 where mask_T is False
    drawn_logprobs_T: Tensor  # the same after top-p and top-k, renormalised over the ids that were left
    place_T: Tensor  # int64: the place of targets_T in its response, from 0; 0 where mask_T is False, as are these:
    length_T: Tensor  # int64: the tokens of that response
    number_T: (
        Tensor  # int64: its number among the response tokens of all rollouts that were packed, in their order
    )
    kept_T: KeptIds  # those ids, none where mask_T is False; of no position where they were not recorded
    cu_seqlens: Tensor  # int32 [S+1]: padded segment offsets, of the whole; all divide by the alignment
    # With prompts of the teacher's own: the same rollouts after these, so the same loss positions in the same order.
    teacher: "Microbatch | None" = None

    @property
    def for_teacher(self) -> "Microbatch":
        """What the teacher reads."""
        return self if self.teacher is None else self.teacher

    def to(self, device: torch.device) -> "Microbatch":
        """The same microbatch on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return Microbatch(**moved)

    def kept_N(self) -> KeptIds:
        """The ids that sampling kept at each loss position; they must have been recorded."""
        assert len(self.kept_T) == len(self.mask_T), "the rollouts were drawn without recording what was kept"
        return self.kept_T.at(self.mask_T.nonzero()[:, 0])

    def shard(self, rank: int, ranks: int) -> "Microbatch":
        """The zigzag share of context-parallel rank `rank` of `ranks`, of a whole microbatch: [T / ranks] tokens.

        That of what the `teacher` reads holds other loss positions.

        With one rank it is the microbatch. ValueError if a segment does not divide by 2 * ranks.
        """
        if ranks == 1:
            return self
        mine = zigzag_positions(self.cu_seqlens, rank, ranks)
        tokens = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("cu_seqlens", "kept_T", "teacher")
        }
        return Microbatch(
            **{name: tensor[mine] for name, tensor in tokens.items()},
            kept_T=self.kept_T.at(mine) if len(self.kept_T) else self.kept_T,
            cu_seqlens=self.cu_seqlens,
            teacher=None if self.teacher is None else self.teacher.shard(rank, ranks),
        )


def pack(
    rollouts: Sequence[Rollout],
    *,
    dp_size: int,
    token_budget: int,
    alignment: int = 1,
    count_multiple: int = 1,
    loss_mask: LossMask | None = None,
    starts: Sequence[int] | None = None,
) -> list[list[Microbatch]]:
    """Deal the rollouts to the data-parallel ranks and pack each rank's share into microbatches.

    `result[dp_rank]` are that rank's microbatches. Every rank has the same number of them, at least one and a
    multiple of `count_multiple`; where a rank would have fewer it splits its largest, and only when each holds
    one rollout it adds an empty one. Deterministic: the same rollouts in the same order give the same microbatches.

    Every segment is padded with zeros to a multiple of `alignment`, and no microbatch exceeds `token_budget`
    tokens. `loss_mask` says which response tokens are loss positions (None: all); the others stay inputs.
    Rollouts without a loss position are left out. Where rollouts have a prompt of the teacher's own, the microbatches
    have a `teacher`, which keeps to the budget too.

    `starts` are those of `response_starts` in a longer list that these rollouts are taken from (None: this list).

    Raises UserError naming `training.microbatch_tokens` when the budget is less than one rollout or than the
    alignment.
    """
    if token_budget < alignment:
        raise UserError(
            f"training.microbatch_tokens = {token_budget} is too small for this parallel layout; set it to "
            f"{alignment} or more"
        )
    starts = response_starts(rollouts) if starts is None else starts
    masked = [
        _Member(rollout, (loss_mask or LossMask()).of(rollout), start)
        for rollout, start in zip(rollouts, starts, strict=True)
    ]
    kept = [member for member in masked if any(member.mask)]
    for_teacher = [member._replace(rollout=_with_teacher_prompt(member.rollout)) for member in kept]
    own_prompts = any(member.rollout.teacher_prompt_ids for member in kept)
    lengths = [
        max(_padded_length(ours.rollout, alignment), _padded_length(theirs.rollout, alignment))
        for ours, theirs in zip(kept, for_teacher, strict=True)
    ]
    if lengths and max(lengths) > token_budget:
        raise UserError(
            f"training.microbatch_tokens = {token_budget} is too small for a rollout of {max(lengths)} "
            f"tokens (prompt, response and padding); set it to {max(lengths)} or more"
        )
    bins_by_rank = [_fill_bins(share, lengths, token_budget) for share in _deal(lengths, dp_size)]
    count = -(-max(1, *map(len, bins_by_rank)) // count_multiple) * count_multiple

    def build(members: list[int]) -> Microbatch:
        student = _build([kept[i] for i in members], alignment)
        if not own_prompts:
            return student
        return replace(student, teacher=_build([for_teacher[i] for i in members], alignment))

    return [[build(members) for members in _spread(bins, lengths, count)] for bins in bins_by_rank]


def response_starts(rollouts: Sequence[Rollout]) -> list[int]:
    """How many response tokens the rollouts before each of them have."""
    return list(accumulate((len(rollout.response_ids) for rollout in rollouts), initial=0))[:-1]


def count_loss_tokens(microbatches: Iterable[Microbatch]) -> int:
    """Loss positions over all microbatches: this rank's part of the normaliser M."""
    return sum(int(microbatch.mask_T.sum()) for microbatch in microbatches)


def count_tokens(microbatches: Iterable[Microbatch]) -> int:
    """Tokens of prompts and responses over all microbatches, padding left out."""
    return sum(int((~microbatch.padding_T).sum()) for microbatch in microbatches)


def _with_teacher_prompt(rollout: Rollout) -> Rollout:
    if not rollout.teacher_prompt_ids:
        return rollout
    return replace(rollout, prompt_ids=rollout.teacher_prompt_ids, kept_ids=KeptIds.of())


def _padded_length(rollout: Rollout, alignment: int) -> int:
    assert rollout.prompt_ids, (
        "a rollout needs a prompt: without one nothing predicts the first response token"
    )
    assert len(rollout.logprobs) == len(rollout.response_ids), "one log-prob per response token"
    assert len(rollout.drawn_logprobs) == len(rollout.response_ids), "one drawn log-prob per response token"
    length = len(rollout.prompt_ids) + len(rollout.response_ids) - 1
    return -(-length // alignment) * alignment


def _longest_first(indices: Iterable[int], lengths: list[int]) -> list[int]:
    return sorted(indices, key=lambda i: (-lengths[i], i))


def _deal(lengths: list[int], dp_size: int) -> list[list[int]]:
    """Longest rollout first, each to the rank with the fewest tokens so far (the lowest rank on a tie)."""
    shares: list[list[int]] = [[] for _ in range(dp_size)]
    loads = [0] * dp_size
    for i in _longest_first(range(len(lengths)), lengths):
        rank = loads.index(min(loads))
        shares[rank].append(i)
        loads[rank] += lengths[i]
    return shares


def _fill_bins(share: list[int], lengths: list[int], token_budget: int) -> list[list[int]]:
    """First-fit decreasing: a near-minimal number of microbatches within the budget."""
    bins: list[list[int]] = []
    loads: list[int] = []
    for i in _longest_first(share, lengths):
        fitting = (b for b, load in enumerate(loads) if load + lengths[i] <= token_budget)
        b = next(fitting, len(bins))
        if b == len(bins):
            bins.append([])
            loads.append(0)
        bins[b].append(i)
        loads[b] += lengths[i]
    return bins


def _spread(bins: list[list[int]], lengths: list[int], count: int) -> list[list[int]]:
    """Bring a rank to `count` microbatches, halving the largest that can be split, and order them by
    rollout."""
    bins = [list(members) for members in bins]
    while len(bins) < count:
        splittable = [members for members in bins if len(members) > 1]
        if not splittable:
            bins.append([])
            continue
        largest = max(splittable, key=lambda members: (sum(lengths[i] for i in members), -min(members)))
        bins.remove(largest)
        bins.extend(_halve(largest, lengths))
    # An empty microbatch goes last; the rest keep the order of the rollouts they hold.
    return sorted((sorted(members) for members in bins), key=lambda members: (not members, members))


def _halve(members: list[int], lengths: list[int]) -> list[list[int]]:
    halves = _deal([lengths[i] for i in members], 2)
    return [[members[position] for position in half] for half in halves]


class _Member(NamedTuple):
    rollout: Rollout
    mask: list[bool]  # of its response
    start: int  # response tokens of the rollouts before it


def _build(members: list[_Member], alignment: int) -> Microbatch:
    """A microbatch of rollouts."""
    tokens: list[int] = []
    targets: list[int] = []
    mask: list[bool] = []
    padding: list[bool] = []
    logprobs: list[float] = []
    drawn: list[float] = []
    places: list[tuple[int, int, int]] = []
    lengths = [_padded_length(member.rollout, alignment) for member in members]
    for (rollout, kept, start), length in zip(members, lengths, strict=True):
        inputs = rollout.prompt_ids + rollout.response_ids[:-1]
        first = len(rollout.prompt_ids) - 1  # the position that predicts the first response token
        tail = length - len(inputs)
        tokens += inputs + [0] * tail
        targets += [0] * first + rollout.response_ids + [0] * tail
        mask += [False] * first + kept + [False] * tail
        padding += [False] * len(inputs) + [True] * tail
        logprobs += [0.0] * first + rollout.logprobs + [0.0] * tail
        drawn += [0.0] * first + rollout.drawn_logprobs + [0.0] * tail
        count = len(rollout.response_ids)
        places += [(0, 0, 0)] * first + [(i, count, start + i) for i in range(count)] + [(0, 0, 0)] * tail
    if not members:
        lengths, tokens, targets = [alignment], [0] * alignment, [0] * alignment
        mask, padding, logprobs = [False] * alignment, [True] * alignment, [0.0] * alignment
        drawn, places = logprobs, [(0, 0, 0)] * alignment
    mask_T = torch.tensor(mask, dtype=torch.bool)
    place_T, length_T, number_T = (
        torch.tensor(places, dtype=torch.int64).where(mask_T[:, None], 0).T.contiguous()
    )
    return Microbatch(
        tokens_T=torch.tensor(tokens, dtype=torch.int64),
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        targets_T=torch.tensor(targets, dtype=torch.int64).where(mask_T, 0),
        mask_T=mask_T,
        padding_T=torch.tensor(padding, dtype=torch.bool),
        rollout_logprobs_T=torch.tensor(logprobs, dtype=torch.float32).where(mask_T, 0.0),
        drawn_logprobs_T=torch.tensor(drawn, dtype=torch.float32).where(mask_T, 0.0),
        place_T=place_T,
        length_T=length_T,
        number_T=number_T,
        kept_T=_kept(members, mask_T),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
    )


def _kept(members: list[_Member], mask_T: Tensor) -> KeptIds:
    """The recorded ids where the mask is True; of no position where a rollout has none."""
    if not all(len(member.rollout.kept_ids) for member in members):
        return KeptIds.of()
    parts = []
    for rollout, mask, _ in members:
        drawn = torch.tensor(rollout.response_ids)
        assert rollout.kept_ids.hold(drawn).all(), "a token is drawn from the ids that were kept"
        parts.append(rollout.kept_ids.at(torch.tensor(mask).nonzero()[:, 0]))
    kept = KeptIds.joined(parts)
    counts_T = torch.zeros(len(mask_T), dtype=torch.int64)
    counts_T[mask_T] = kept.counts_N
    return KeptIds.counted(kept.ids_E, counts_T)
