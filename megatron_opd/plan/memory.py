"""Bytes of a rank by part, and in which phase of a step the most of them are alive together.

Always there: weights, gradients and optimizer state of the student, weights of teacher and reference, and the float32
average that a teacher becomes; what is offloaded lies in host memory instead, weights except while their model scores.
A teacher in a layout of its own is as that layout has it, on the student's ranks or on others; the student's last stage
then has the teacher's head too. Besides, one phase at a time: `rollout` (cache of keys and values, logits, copies of
weights), `scoring` (the teacher's pass and its payload) and `training` (payload, activations, objective). Formulas
stand with each function. What servers draw or score takes none of it here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_opd.kernels.torch_streaming import CPU_BLOCK_ELEMENTS
from megatron_opd.models.architecture import Architecture
from megatron_opd.objectives.logits import CPU_WEIGHT_GRADIENT_ELEMENTS, DEVICE_WEIGHT_GRADIENT_ELEMENTS
from megatron_opd.plan.activations import kept_by_chunk, kept_by_layer, recomputed_attention
from megatron_opd.plan.handover import dealt_payload, held_payloads
from megatron_opd.plan.parameters import Parameter, chunks_of_stage, stage_layers, stage_parameters
from megatron_opd.plan.setting import Pack, Setting
from megatron_opd.rollout.local import PROMPT_TOKENS
from megatron_opd.training.models import reads_hidden_states

_FP32 = 4
_INDEX = 8  # int64
_STATISTICS = (
    400  # bytes a loss token, and a token and id of a top-K support: what tests/objectives/test_memory.py
)
_SUPPORT = 250  # holds the objectives to
PHASES = ("rollout", "scoring", "training")


@dataclass(frozen=True)
class StageMemory:
    """Bytes of the fullest rank of a pipeline stage: parts that stay, and those of each phase."""

    stage: int
    always: dict[str, int]
    phases: dict[str, dict[str, int]]
    teaches: bool = False  # the stage is one of a teacher on ranks of its own

    def __str__(self) -> str:
        return f"teacher's stage {self.stage}" if self.teaches else f"stage {self.stage}"

    @property
    def phase(self) -> str:
        """The phase with the most."""
        return max(PHASES, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> dict[str, int]:
        """What is alive at the peak."""
        return {**self.always, **self.phases[self.phase]}

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


def stage_memory(setting: Setting, stage: int) -> StageMemory:
    """Of the fullest rank of this pipeline stage of the student."""
    if setting.separate:
        return _rank_memory(setting, stage, None)
    ranks = setting.layout.world_size // setting.layout.pipeline
    of_teacher = setting.layout.world_size // (setting.own_layout or setting.layout).pipeline
    beside = range(stage * ranks // of_teacher, ((stage + 1) * ranks - 1) // of_teacher + 1)
    return max((_rank_memory(setting, stage, theirs) for theirs in beside), key=lambda one: one.total)


def teacher_memory(setting: Setting, stage: int) -> StageMemory:
    """Of the fullest rank of this pipeline stage of a teacher on ranks of its own."""
    return _rank_memory(setting, None, stage)


def _rank_memory(setting: Setting, stage: int | None, theirs: int | None) -> StageMemory:
    """Of a rank with this stage of the student and that one of the teacher; None: it has nothing of the model."""
    config, always, lent = setting.config, dict[str, int](), dict[str, int]()
    student: Sequence[Sequence[Parameter]] = ()
    if stage is not None:
        student = stage_parameters(setting.student, setting.layout, setting.padded_vocab, stage)
        weights, gradients, state = trained_bytes(setting, student)
        if config.optimizer.cpu_offload:
            state = 0
        always = {"student weights": weights, "gradients": gradients, "optimizer state": state}
    for role, model, arch, place in (
        ("teacher", config.teacher, setting.teacher, theirs),
        ("reference", config.reference, setting.reference, stage),
    ):
        if model is not None and arch is not None and place is not None:
            head, others = frozen_bytes(setting.teaching if role == "teacher" else setting, arch, place)
            always[f"{role} weights"] = head if model.offload else head + others
            if model.offload:
                lent[f"offloaded {role} weights"] = others
    if config.teacher.ema is not None:
        always["teacher average"] = _FP32 * sum(p.numel for chunk in student for p in chunk)
    if stage == setting.last_stage and setting.own_layout is not None and reads_hidden_states(config):
        assert setting.teacher is not None
        always["teacher head"] = setting.bytes_per_value * setting.vocab_shard * setting.teacher.hidden_size
    phases = {
        "rollout": _rollout(setting, stage, student) if stage is not None and setting.own_rollouts else {},
        "scoring": {**_scoring(setting, stage, theirs), **lent},
        "training": _training(setting, stage, student) if stage is not None else {},
    }
    place = theirs if stage is None else stage
    assert place is not None
    return StageMemory(place, always, phases, teaches=stage is None)


def frozen_bytes(setting: Setting, arch: Architecture, stage: int) -> tuple[int, int]:
    """Weights of a model that is only run forward: (the LM head if it is never offloaded, all others)."""
    chunks = stage_parameters(arch, setting.layout, setting.padded_vocab, stage)
    total = setting.bytes_per_value * sum(p.numel for chunk in chunks for p in chunk)
    kept = stage == setting.last_stage and setting.lends_head
    head = setting.bytes_per_value * setting.vocab_shard * arch.hidden_size if kept else 0
    return head, total - head


def buckets(
    parameters: Sequence[Parameter], ranks: int, distributed: bool
) -> list[tuple[int, list[tuple[int, int]]]]:
    """megatron-core's gradient buffer of these parameters: (end of the bucket, (start, end) of each parameter).

    Parameters lie in it in reverse order. With the distributed optimizer each starts at a multiple of 64, a bucket
    ends at a multiple of lcm(ranks, 128), and an embedding shared by two stages has a bucket of its own.
    """
    alignment, multiple = (64, math.lcm(ranks, 128)) if distributed else (1, 1)
    done: list[tuple[int, list[tuple[int, int]]]] = []
    spans: list[tuple[int, int]] = []
    end = 0

    def close() -> None:
        nonlocal end, spans
        end = -(-end // multiple) * multiple
        done.append((end, spans))
        spans = []

    for parameter in reversed(parameters):
        alone = distributed and parameter.shared_embedding
        start = -(-end // alignment) * alignment
        if alone and spans:
            end = start
            close()
            start = end
        end = start + parameter.numel
        spans.append((start, end))
        if alone:
            close()
    if spans:
        close()
    return done


def trained_bytes(setting: Setting, chunks: Sequence[Sequence[Parameter]]) -> tuple[int, int, int]:
    """(weights, gradients, optimizer state) of the fullest rank that holds these chunks.

    Gradients: float32, in megatron-core's buffers. Weights: with the distributed optimizer they lie in buffers of the
    same length. State: two float32 moments with Adam, none with SGD, and for bf16 weights float32 masters; of all
    parameters, or with the distributed optimizer of an equal part of every bucket.
    """
    distributed, value = setting.config.optimizer.sharded, setting.bytes_per_value
    per_number = (8 if setting.config.optimizer.name == "adam" else 0) + (4 if value < _FP32 else 0)
    weights = gradients = state = 0
    for chunk in chunks:
        for expert, ranks in ((False, setting.data_ranks), (True, setting.expert_data_ranks)):
            parameters = [parameter for parameter in chunk if parameter.expert == expert]
            if not parameters:
                continue
            found = buckets(parameters, ranks, distributed)
            length = found[-1][0]
            weights += value * length
            gradients += _FP32 * length
            state += per_number * (_largest_share(found, ranks) if distributed else length)
    return weights, gradients, state


def _largest_share(found: list[tuple[int, list[tuple[int, int]]]], ranks: int) -> int:
    """Numbers of the rank whose parts of the buckets hold the most, padding left out."""
    totals = [0] * ranks
    begin = 0
    for end, spans in found:
        part = (end - begin) // ranks
        for start, stop in spans:
            for rank in range((start - begin) // part, min((stop - 1 - begin) // part + 1, ranks)):
                low = begin + rank * part
                totals[rank] += max(0, min(stop, low + part) - max(start, low))
        begin = end
    return max(totals)


def kv_cache(setting: Setting, layers: int) -> int:
    """2 * layers * sequences * (P + R - 1) * G numbers: the last token of a response is never an input."""
    arch, work = setting.student, setting.workload
    width = arch.num_kv_groups * arch.head_dim // setting.layout.tensor
    slots = work.prompt + work.response - 1
    return 2 * layers * work.decoded_together * slots * width * setting.bytes_per_value


def _rollout(setting: Setting, stage: int, chunks: Sequence[Sequence[Parameter]]) -> dict[str, int]:
    """The cache, copies of weights, and the larger of a prompt pass and of drawing from logits.

    Experts under expert parallelism: a replica gathers all of the stage's, dealt out over its tensor-parallel ranks.
    On a CPU every matrix is copied in another order. A prompt pass holds at most `PROMPT_TOKENS` tokens (a longer
    prompt alone) and what one layer would keep. Drawing holds the shards and the whole of the logits [B, V] in the
    weights' dtype and two float32 copies.
    """
    arch, work, layout = setting.student, setting.workload, setting.layout
    layers = stage_layers(arch, layout)
    value = setting.bytes_per_value
    experts = sum(parameter.numel for chunk in chunks for parameter in chunk if parameter.expert)
    all_experts = experts * layout.expert // layout.tensor
    dense = sum(
        parameter.numel
        for chunk in chunks
        for parameter in chunk
        if parameter.matrix and not parameter.expert
    )
    if setting.kernels == "cpu":
        copies = value * (dense + all_experts)
    else:
        copies = value * all_experts if layout.expert > 1 else 0
    tokens = max(work.prompt, min(PROMPT_TOKENS, work.prompt * work.prompts))
    prompts = Pack(tokens, 0, tokens, work.prompt)
    shared = 1 if layout.tensor == 1 else 2
    drawing = work.decoded_together * setting.padded_vocab * (shared * value + 2 * _FP32)
    last = stage == layout.pipeline - 1
    return {
        "key-value cache": kv_cache(setting, layers),
        "weights for decoding": copies,
        "working set": max(kept_by_layer(setting, arch, prompts), drawing if last else 0),
    }


def _scoring(setting: Setting, stage: int | None, theirs: int | None) -> dict[str, int]:
    """Payloads, and what one layer of the largest model that scores would keep.

    Log-probs of the student or the reference as they were, the student's likeliest ids and most payloads: the hidden
    states of that model at the loss tokens of a microbatch, and their logits, which `head_chunk` bounds; those of the
    payload logits are gathered, and copied without the ids that pad the vocabulary.
    """
    work, value = setting.workload, setting.bytes_per_value
    later = setting.config.training.updates_per_rollout > 1 and setting.objective.reads_old_logprobs
    passes: list[
        tuple[Setting, Architecture, Pack, bool]
    ] = []  # what it reads, and whether it makes logits here
    if setting.teacher is not None and theirs is not None:
        where = setting.teaching
        projects = setting.teacher_projects and theirs == where.last_stage
        passes.append((where, setting.teacher, work.teacher_fullest, projects))
    if stage is not None:
        models = [setting.student] if later or setting.names_ids else []
        models += [setting.reference] if setting.reference else []
        passes += [(setting, arch, work.fullest, stage == setting.last_stage) for arch in models]
    hidden = logits = 0
    for where, arch, _, projects in passes:
        if projects:
            tokens = work.fullest.loss_tokens // where.layout.context
            hidden = max(hidden, arch.hidden_size * tokens * value)
            logits = max(logits, _chunk(where, work.fullest) * where.vocab_shard * value)
            if arch is setting.teacher and setting.config.teacher.payload == "logits":
                logits = max(logits, tokens * (where.vocab_shard + 2 * where.padded_vocab) * value)
    layer = max((kept_by_layer(where, arch, read) for where, arch, read, _ in passes), default=0)
    return {
        "teacher payload": held_payloads(setting, stage, theirs, scoring=True),
        "hidden states": hidden,
        "working set": max(layer, logits, dealt_payload(setting, stage)),
    }


def in_flight(setting: Setting, stage: int) -> float:
    """Microbatches whose activations a stage holds at once, 1F1B: as many as stages follow, and one.

    Interleaved: of its VPP chunks, 2 for every stage that follows and PP for every chunk but one, and one more; a
    chunk counts as 1 / VPP microbatches.
    """
    layout, count = setting.layout, setting.workload.microbatches
    after = layout.pipeline - stage - 1
    if layout.virtual_pipeline == 1:
        return min(count, after + 1)
    chunks = 2 * after + (layout.virtual_pipeline - 1) * layout.pipeline + 1
    return min(count * layout.virtual_pipeline, chunks) / layout.virtual_pipeline


def _training(setting: Setting, stage: int, parameters: Sequence[Sequence[Parameter]]) -> dict[str, int]:
    """Payload, activations of all microbatches in flight, and the larger of two things that are never there together:
    the objective with the head's gradient, and the backward pass of a layer.

    The latter computes again what the recompute policy has left out of a layer, and makes the gradient of its largest
    weight in the weights' dtype before it is added to the float32 ones.
    """
    arch, layout, pack = setting.student, setting.layout, setting.workload.fullest
    chunks = chunks_of_stage(arch, layout, stage)
    kept = sum(kept_by_chunk(setting, arch, pack, chunk) for chunk in chunks)
    recompute = setting.config.training.recompute
    again = {"none": 0, "selective": recomputed_attention(setting, arch, pack)}
    again["full"] = kept_by_layer(setting, arch, pack)
    largest = max(parameter.numel for chunk in parameters for parameter in chunk)
    layer = again[recompute] + setting.bytes_per_value * largest
    head = objective_buffers(setting, pack) if stage == layout.pipeline - 1 else 0
    return {
        "teacher payload": held_payloads(setting, stage, None, scoring=False),
        "activations": math.ceil(kept * in_flight(setting, stage)),
        "objective": head if head >= layer else 0,
        "working set": layer if layer > head else 0,
    }


def _chunk(setting: Setting, pack: Pack) -> int:
    """Loss tokens whose logits exist at once."""
    tokens = pack.loss_tokens // setting.layout.context
    return min(setting.config.objective.head_chunk or tokens, tokens)


def objective_buffers(setting: Setting, pack: Pack) -> int:
    """On the last stage, of N loss tokens: the student's hidden states [N, H] and their gradient, statistics, and

    - logits shards [N, V/TP] of student and teacher, unless it gives log-probs (the gradient is written into the
      student's), on a CPU with three float32 blocks of the kernels; or, later, one of them with the gradient of the
      head [V/TP, H];
    - with `head_chunk` the logits of a chunk only, the block of the head's gradient that is computed at once, and zeros
      that stand for the head's gradient.
    """
    section, value = setting.config.objective, setting.bytes_per_value
    tokens = pack.loss_tokens // setting.layout.context
    cpu, hidden = setting.kernels == "cpu", setting.student.hidden_size
    logits = _chunk(setting, pack) * setting.vocab_shard
    blocks = 3 * _FP32 * min(CPU_BLOCK_ELEMENTS, logits) if cpu else 0
    head = value * setting.vocab_shard * hidden
    models = 1 if setting.objective.served else 2
    size = 2 * value * tokens * hidden + _STATISTICS * tokens
    if setting.objective.support != "full":
        size += _SUPPORT * tokens * (section.k + 1)
    if section.head_chunk is None:
        return size + max(models * value * logits + blocks, value * logits + head)
    block = CPU_WEIGHT_GRADIENT_ELEMENTS if cpu else DEVICE_WEIGHT_GRADIENT_ELEMENTS
    return (
        size + models * value * logits + max(blocks, value * min(block, setting.vocab_shard * hidden), head)
    )
