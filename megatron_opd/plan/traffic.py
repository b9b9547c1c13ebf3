"""What a rank sends in a step, by process group and kind of collective.

A ring sends (n - 1) / n of the whole tensor for an all-gather and a reduce-scatter, twice that for an all-reduce; an
all-to-all with equal shares (n - 1) / n of what the rank gives. Numbers of a few bytes (counts, norms, shapes) are left
out. A teacher in a layout of its own has groups of its own, and sends its payloads by itself. Symbols as in
`activations`; c bytes of a value of the weights' dtype, the residual stream between stages is
float32.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_opd.models.architecture import Architecture
from megatron_opd.plan.activations import Widths
from megatron_opd.plan.flops import scoring_passes
from megatron_opd.plan.handover import Handover, payload_row
from megatron_opd.plan.memory import buckets
from megatron_opd.plan.parameters import chunks_of_stage, stage_layers, stage_parameters
from megatron_opd.plan.setting import Pack, Setting
from megatron_opd.rollout.local import PROMPT_TOKENS

_FP32 = 4
_INDEX = 8  # int64
PHASES = ("prompts", "decoding", "scoring", "training", "optimizer")


@dataclass(frozen=True)
class Traffic:
    """`calls` of one kind with a tensor of `nbytes`: whole, or for all_to_all, gather and send what the rank gives."""

    phase: str
    group: str
    kind: str
    ranks: int
    calls: float
    nbytes: float

    @property
    def sent(self) -> float:
        """Bytes that the rank sends, all calls together."""
        others = (self.ranks - 1) / self.ranks
        return self.calls * self.nbytes * {"all_reduce": 2 * others, "send": 1}.get(self.kind, others)


def group_sizes(setting: Setting) -> dict[str, int]:
    """Ranks of each process group, under the names of `parallel.groups`."""
    layout = setting.layout
    return {
        "tp": layout.tensor,
        "pp": layout.pipeline,
        "cp": layout.context,
        "ep": layout.expert,
        "dp_cp": setting.data_ranks,
        "expt_dp": setting.expert_data_ranks,
        "mp": layout.tensor * layout.pipeline,
        "embd": min(2, layout.pipeline),
        "messages": setting.processes,
    }


def stage_traffic(setting: Setting, stage: int) -> list[Traffic]:
    """Of a rank of a stage in one step, only what groups of several ranks send."""
    parts = (_rollout, _scoring, _training, _updates)
    return _sending(one for part in parts for one in part(setting, stage))


def teacher_traffic(setting: Setting, stage: int) -> list[Traffic]:
    """Of a rank of a stage of a teacher in a layout of its own: its passes, and the payloads to the student's ranks."""
    assert setting.teacher is not None and setting.payload is not None
    where, work = setting.teaching, setting.teaching.workload
    found = list(_pass(where, setting.teacher, stage, work.updates * work.microbatches))
    route, form = Handover.of(setting.layouts), setting.payload
    if stage == where.last_stage and route.sent:
        busiest = max(route.sent, key=lambda rank: route.sent[rank])
        numbers = work.updates * setting.workload.microbatches * setting.layout.data
        calls = numbers * route.messages[busiest] * len(form.tensors)
        size = payloads_sent(setting)[busiest]
        found.append(_calls(setting, "scoring", "messages", "send", calls, size / calls))
    return _sending(found)


def payloads_sent(setting: Setting) -> dict[int, float]:
    """Bytes of payloads that each rank sends in a step, from a teacher in a layout of its own."""
    return _payloads(setting, Handover.of(setting.layouts).sent)


def payloads_received(setting: Setting) -> dict[int, float]:
    """And that each rank receives."""
    return _payloads(setting, Handover.of(setting.layouts).received)


def _payloads(setting: Setting, rows: dict[int, float]) -> dict[int, float]:
    assert setting.payload is not None
    work = setting.workload
    size = work.responses * work.response * setting.payload.bytes_per_position
    return {rank: share * size for rank, share in sorted(rows.items())}


def _sending(traffic: Iterable[Traffic]) -> list[Traffic]:
    return [one for one in traffic if one.ranks > 1 and one.calls * one.nbytes > 0]


def _calls(setting: Setting, phase: str, group: str, kind: str, calls: float, nbytes: float) -> Traffic:
    return Traffic(phase, group, kind, group_sizes(setting)[group], calls, nbytes)


def _rollout(setting: Setting, stage: int) -> Iterator[Traffic]:
    """Experts that other ranks train; then prompt passes, and a pass a token.

    A pass sums [N, H] over TP twice a layer and once for the embedding, and hands [N, H] to the next chunk. Every
    token draws from the gathered logits [B, V] and tells the replica (id, log-prob). No CP or EP inside a pass.
    Nothing where servers draw.
    """
    if not setting.own_rollouts:
        return
    arch, layout, work, c = setting.student, setting.layout, setting.workload, setting.bytes_per_value
    chunks = chunks_of_stage(arch, layout, stage)
    weights = stage_parameters(arch, layout, setting.padded_vocab, stage)
    experts = c * sum(p.numel for chunk in weights for p in chunk if p.expert)
    yield _calls(setting, "prompts", "ep", "all_gather", 1, experts * layout.expert)
    sums = 2 * stage_layers(arch, layout) + (stage == 0)
    hops = sum(not chunk.last for chunk in chunks)
    prompts = work.prompts * work.prompt
    batches = work.generated / work.decoded_together
    passes = max(batches, prompts / max(PROMPT_TOKENS, work.prompt))
    steps = batches * work.response
    for phase, count, tokens in (
        ("prompts", passes, prompts / passes),
        ("decoding", steps, work.decoded_together),
    ):
        yield _calls(setting, phase, "tp", "all_reduce", count * sums, c * tokens * arch.hidden_size)
        yield _calls(setting, phase, "pp", "send", count * hops, _FP32 * tokens * arch.hidden_size)
    if stage == layout.pipeline - 1:
        logits = c * work.decoded_together * setting.vocab_shard
        yield _calls(setting, "decoding", "tp", "gather", steps, logits)
    yield _calls(setting, "decoding", "mp", "broadcast", steps, 16 * work.decoded_together)


def _scoring(setting: Setting, stage: int) -> Iterator[Traffic]:
    """A forward pass of a teacher in this layout, and of other models that score, for every microbatch; or what servers
    say."""
    work = setting.workload
    passes = work.updates * work.microbatches
    if setting.teacher is not None and setting.teacher_here:
        yield from _pass(setting, setting.teacher, stage, passes)
    for arch, share in scoring_passes(setting):
        yield from _pass(setting, arch, stage, share * passes)
    if setting.teacher is None and stage == setting.layout.pipeline - 1:
        yield from _served(setting, passes)
    if setting.config.teacher.prompt_template is not None and stage == setting.layout.pipeline - 1:
        yield from _dealt(setting, passes)


def _pass(setting: Setting, arch: Architecture, stage: int, passes: float) -> Iterator[Traffic]:
    """Forward passes of a model that scores, and what it makes of the hidden states."""
    pack = setting.scored_pack(arch)
    yield from _forward(setting, "scoring", arch, pack, stage, passes)
    yield from _gathered_hidden(setting, "scoring", arch, pack, stage, passes)
    projects = arch is not setting.teacher or setting.teacher_projects
    if projects and stage == setting.last_stage:
        size = pack.loss_tokens // setting.layout.context * _score_bytes(setting, arch)
        yield _calls(setting, "scoring", "tp", "all_gather", passes, size)


def _score_bytes(setting: Setting, arch: Architecture) -> int:
    """Of a loss token in the all-gather over TP: statistics for the log-prob of the sampled token, or for the likeliest
    ids of a rank's shard, or for both; or the logits themselves."""
    payload = setting.payload
    if arch is setting.teacher and payload is not None:
        if payload.kind == "logits":
            return setting.bytes_per_value * setting.padded_vocab
        numbers = 3 + (2 * payload.k if payload.kind == "topk" else 0)
    else:
        numbers = 2 + 2 * setting.served_ids if setting.names_ids and arch is setting.student else 3
    return numbers * _FP32 * setting.layout.tensor


def _served(setting: Setting, passes: float) -> Iterator[Traffic]:
    """What a rank needs to ask servers: over CP tokens, targets and mask of a microbatch [3, T], and the ids to ask for
    with the mask again [K + 1, T], all int64. Then what they say, once an update over CP and TP."""
    pack, ids = setting.workload.pack, setting.served_ids
    rows = 3 + (ids + 1 if setting.names_ids else 0)
    yield _calls(setting, "scoring", "cp", "all_gather", passes, _INDEX * rows * pack.tokens)
    said = payload_bytes(setting) * pack.loss_tokens * setting.workload.microbatches
    for group in ("cp", "tp"):
        yield _calls(setting, "scoring", group, "broadcast", setting.workload.updates, said)


def _dealt(setting: Setting, passes: float) -> Iterator[Traffic]:
    """Payloads over CP from the shares of the teacher's sequences to those of the student's: rows [T] of what the
    teacher read, and the int64 masks of both; before that the student's likeliest ids, in int64, for servers."""
    ours, theirs = setting.workload.pack.tokens, setting.workload.teacher_pack.tokens
    ids = setting.served_ids
    sizes = payload_row(setting) * theirs + _INDEX * (ours + theirs)
    if setting.names_ids:
        sizes += _INDEX * (ids * ours + ours + theirs)
    yield _calls(setting, "scoring", "cp", "all_gather", passes, sizes)


def payload_bytes(setting: Setting) -> int:
    """Of a response token from servers: a float32 log-prob of it and of every id, and the ids in int32."""
    return _FP32 * (1 + 2 * setting.served_ids)


def _training(setting: Setting, stage: int) -> Iterator[Traffic]:
    """Forward, what is recomputed, backward, and the objective, for every microbatch."""
    arch, work, layout = setting.student, setting.workload, setting.layout
    passes = work.updates * work.microbatches
    recompute = setting.config.training.recompute
    yield from _forward(setting, "training", arch, work.pack, stage, passes)
    if recompute == "full":
        yield from _layers_forward(setting, "training", arch, work.pack, stage, passes)
    elif recompute == "selective":
        yield from _attention(setting, "training", "all_gather", arch, work.pack, stage, passes)
    yield from _backward(setting, arch, work.pack, stage, passes)
    yield from _gathered_hidden(setting, "training", arch, work.pack, stage, passes)
    if stage == layout.pipeline - 1:
        yield from _objective(setting, passes)


def _forward(
    setting: Setting, phase: str, arch: Architecture, pack: Pack, stage: int, passes: float
) -> Iterator[Traffic]:
    """The layers; the embedding's sum [t, H] on the first stage; the residual stream to the next chunk."""
    w, chunks = Widths.of(setting, arch, pack), chunks_of_stage(arch, setting.layout, stage)
    yield from _layers_forward(setting, phase, arch, pack, stage, passes)
    if stage == 0:
        kind = "reduce_scatter" if setting.layout.sequence_parallel else "all_reduce"
        yield _calls(setting, phase, "tp", kind, passes, w.c * w.t * w.H)
    hops = sum(not chunk.last for chunk in chunks)
    yield _calls(setting, phase, "pp", "send", passes * hops, _FP32 * w.s * w.H)


def _layers_forward(
    setting: Setting, phase: str, arch: Architecture, pack: Pack, stage: int, passes: float
) -> Iterator[Traffic]:
    """A layer's attention and feed-forward part each sum [t, H] over TP (with sequence parallelism: all-gather before
    and reduce-scatter after it); experts instead send K tokens a token there and back, with their weights."""
    w = Widths.of(setting, arch, pack)
    count = passes * stage_layers(arch, setting.layout)
    parts = 1 if arch.moe else 2
    kinds = ("all_gather", "reduce_scatter") if setting.layout.sequence_parallel else ("all_reduce",)
    for kind in kinds:
        yield _calls(setting, phase, "tp", kind, parts * count, w.c * w.t * w.H)
    yield from _attention(setting, phase, "all_gather", arch, pack, stage, passes)
    yield from _experts(setting, phase, arch, w, count)


def _attention(
    setting: Setting, phase: str, kind: str, arch: Architecture, pack: Pack, stage: int, passes: float
) -> Iterator[Traffic]:
    """Keys and values of the whole microbatch over CP, [T, 2 G]; their gradients the other way."""
    w = Widths.of(setting, arch, pack)
    count = passes * stage_layers(arch, setting.layout)
    yield _calls(setting, phase, "cp", kind, count, w.c * pack.tokens * 2 * w.G)


def _experts(setting: Setting, phase: str, arch: Architecture, w: Widths, count: float) -> Iterator[Traffic]:
    """Tokens to their experts and back [s K, H], and the router's weights [s K] in float32."""
    if arch.moe is not None:
        sent = w.s * arch.moe.experts_per_token
        yield _calls(setting, phase, "ep", "all_to_all", 2 * count, w.c * sent * w.H)
        yield _calls(setting, phase, "ep", "all_to_all", count, _FP32 * sent)


def _backward(
    setting: Setting, arch: Architecture, pack: Pack, stage: int, passes: float
) -> Iterator[Traffic]:
    """The sums of forward the other way; with sequence parallelism the inputs of the projections are gathered once
    more for their weights' gradients."""
    w, layout = Widths.of(setting, arch, pack), setting.layout
    chunks = chunks_of_stage(arch, layout, stage)
    count = passes * stage_layers(arch, layout)
    parts, whole = (1 if arch.moe else 2), w.c * w.t * w.H
    if layout.sequence_parallel:
        yield _calls(
            setting, "training", "tp", "all_gather", 2 * parts * count + passes * (stage == 0), whole
        )
        yield _calls(setting, "training", "tp", "reduce_scatter", parts * count, whole)
    else:
        yield _calls(setting, "training", "tp", "all_reduce", parts * count, whole)
    yield from _attention(setting, "training", "reduce_scatter", arch, pack, stage, passes)
    yield from _experts(setting, "training", arch, w, count)
    hops = sum(not chunk.first for chunk in chunks)
    yield _calls(setting, "training", "pp", "send", passes * hops, _FP32 * w.s * w.H)


def _gathered_hidden(
    setting: Setting, phase: str, arch: Architecture, pack: Pack, stage: int, passes: float
) -> Iterator[Traffic]:
    """The final hidden states [t, H] under sequence parallelism, on the last stage."""
    if setting.layout.sequence_parallel and stage == setting.layout.pipeline - 1:
        w = Widths.of(setting, arch, pack)
        yield _calls(setting, phase, "tp", "all_gather", passes, w.c * w.t * w.H)


def _objective(setting: Setting, passes: float) -> Iterator[Traffic]:
    """Statistics in one all-gather (as `vocab_parallel_divergence` and `topk_divergence` state), gradient of the hidden
    states [N, H]; over CP what looks along a response, 3 float32 a token."""
    section, pack = setting.objective, setting.workload.pack
    tokens = pack.loss_tokens // setting.layout.context
    kind = "reverse_kl" if section.sampled else section.divergence
    rows = [9 + (kind == "forward_kl")]
    if section.served:
        rows = [4 + section.k if section.support != "full" else 4]
    elif section.support != "full":
        rows = [9 + 3 * section.k]
    elif kind == "jsd":
        rows = [9, 2]
    for count in rows:
        size = _FP32 * count * tokens * setting.layout.tensor
        yield _calls(setting, "training", "tp", "all_gather", passes, size)
    hidden = setting.bytes_per_value * tokens * setting.student.hidden_size
    yield _calls(setting, "training", "tp", "all_reduce", passes, hidden)
    if section.token_weight.kind != "uniform" or (section.sampled and section.policy.discount > 0):
        yield _calls(setting, "training", "cp", "all_gather", passes, 3 * _FP32 * pack.tokens)


def _updates(setting: Setting, stage: int) -> Iterator[Traffic]:
    """Once an update: gradients (float32) summed over the ranks with the same weights, and with the distributed
    optimizer reduce-scattered and the new weights gathered; a tied embedding's over the first and last stage; those of
    norms and routers over TP, where each rank has seen a part of the sequence or of the heads. With experts there are
    two optimizers, and megatron-core gathers all weights after each. A teacher that follows the student needs its
    float32 weights whole."""
    arch, layout, updates = setting.student, setting.layout, setting.workload.updates
    chunks = stage_parameters(arch, layout, setting.padded_vocab, stage)
    distributed = setting.config.optimizer.sharded
    for chunk in chunks:
        for expert, group in ((False, "dp_cp"), (True, "expt_dp")):
            held = [parameter for parameter in chunk if parameter.expert == expert]
            if held:
                length = buckets(held, group_sizes(setting)[group], distributed)[-1][0]
                kind = "reduce_scatter" if distributed else "all_reduce"
                yield _calls(setting, "optimizer", group, kind, updates, _FP32 * length)
                if distributed:
                    value, gathers = setting.bytes_per_value, updates * (2 if arch.moe else 1)
                    yield _calls(setting, "optimizer", group, "all_gather", gathers, value * length)
                if distributed and setting.config.teacher.ema is not None and setting.bytes_per_value < _FP32:
                    numbers = sum(parameter.numel for parameter in held)
                    yield _calls(setting, "optimizer", group, "all_reduce", updates, _FP32 * numbers)
        shared = sum(parameter.numel for parameter in chunk if parameter.shared_embedding)
        yield _calls(setting, "optimizer", "embd", "all_reduce", updates, _FP32 * shared)
    layers = stage_layers(arch, layout)
    norms = layers * 2 * arch.head_dim if arch.qk_norm else 0
    if layout.sequence_parallel:
        router = arch.num_experts * arch.hidden_size
        norms += layers * (2 * arch.hidden_size + router) + arch.hidden_size * (stage == layout.pipeline - 1)
    yield _calls(setting, "optimizer", "tp", "all_reduce", updates, _FP32 * norms)
