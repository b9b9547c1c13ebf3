"""The models of a run: student, teacher and reference, with their weights."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opd.checkpoint.fingerprint import FINGERPRINTS, fingerprint
from megatron_opd.checkpoint.head import load_head
from megatron_opd.checkpoint.weights import join_load, load_model_weights
from megatron_opd.config.schema import Config, TeacherConfig
from megatron_opd.models.architecture import Architecture
from megatron_opd.models.gpt import DTYPES, GPT, build_gpt
from megatron_opd.parallel.groups import ParallelLayout, all_ranks
from megatron_opd.preflight import Checked
from megatron_opd.teacher.cache import PayloadCache, Source
from megatron_opd.teacher.cached import CachedTeacher
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.teacher.payload import PayloadFormat
from megatron_opd.teacher.relaid import Reader, RelaidTeacher
from megatron_opd.teacher.separate import SeparateTeacher
from megatron_opd.teacher.several import SeveralTeachers
from megatron_opd.teacher.sglang import SGLangTeacher
from megatron_opd.teacher.teacher import Teacher
from megatron_opd.training.relay import Relay


def load_models(
    config: Config,
    checked: Checked,
    layout: ParallelLayout,
    groups: ProcessGroupCollection,
    device: torch.device,
    relay: Relay | None = None,
) -> tuple[list[GPT], Teacher, MegatronTeacher | None]:
    """Student, teacher or teachers and, where there is one, reference with their weights, in one layout.

    A teacher in a layout of its own has `relay`. Nothing is loaded of a teacher behind servers. The vocabularies of
    models in the student's layout are padded to the same size.
    """
    padded = checked.padded_vocab_size

    def load(arch: Architecture, folder: Path, recompute: str = "none") -> list[GPT]:
        return load_gpt(arch, folder, layout, groups, config.precision, padded, device, recompute)

    def load_teacher(config: Config, checked: Checked) -> Teacher:
        teacher: Teacher
        if checked.teacher is None:
            teacher = served_teacher(config, checked, groups)
        elif relay is not None:
            teacher = teacher_in_own_layout(config, checked, relay, groups, device)
        else:
            chunks = load(checked.teacher, config.teacher.folder)
            teacher = megatron_teacher(config, checked, chunks, groups)
        if config.teacher.cache is None:
            return teacher
        return cached_teacher(config, checked, teacher, layout, groups, device)

    if checked.teachers:
        teacher: Teacher = several_teachers(config, checked, load_teacher)
    else:
        teacher = load_teacher(config, checked)
    reference = None
    if config.reference is not None and checked.reference is not None:
        reference = MegatronTeacher(
            load(checked.reference, config.reference.path), groups, offload=config.reference.offload
        )
    trained = checked.student.with_aux_loss(config.training.moe_aux_loss)
    return load(trained, config.student.path, config.training.recompute), teacher, reference


def load_gpt(
    arch: Architecture,
    folder: Path,
    layout: ParallelLayout,
    groups: ProcessGroupCollection,
    precision: str,
    padded_vocab_size: int,
    device: torch.device,
    recompute: str = "none",
) -> list[GPT]:
    """This rank's chunks of a model with their weights, see `build_gpt` and `load_model_weights`."""
    chunks = build_gpt(
        arch, layout, groups, precision=precision, padded_vocab_size=padded_vocab_size, recompute=recompute
    )
    load_model_weights(chunks, arch, folder, groups=groups, padded_vocab_size=padded_vocab_size)
    return [chunk.to(device) for chunk in chunks]


def several_teachers(
    config: Config,
    checked: Checked,
    load: Callable[[Config, Checked], Teacher],
) -> SeveralTeachers:
    """The teachers of `teacher.paths`, each as if it was the only one; vocabularies are padded as for all."""
    teachers = {
        name: load(config.with_teacher(name), checked.with_teacher(name)) for name in config.teacher.paths
    }
    given = config.teacher.weights
    total = sum(given.values())
    return SeveralTeachers(teachers, {name: weight / total for name, weight in given.items()} or None)


def megatron_teacher(
    config: Config,
    checked: Checked,
    chunks: list[GPT],
    groups: ProcessGroupCollection,
    *,
    lends_head: bool = True,
) -> MegatronTeacher:
    """The teacher of these chunks, with the payload that the run asks for."""
    assert checked.teacher is not None
    form = payload_format(config, checked.teacher, checked.vocab_size)
    return MegatronTeacher(
        chunks,
        groups,
        form=form,
        head_chunk=config.objective.head_chunk,
        offload=config.teacher.offload,
        lends_head=lends_head,
    )


def teacher_in_own_layout(
    config: Config, checked: Checked, relay: Relay, groups: ProcessGroupCollection, device: torch.device
) -> RelaidTeacher | SeparateTeacher:
    """A teacher in its own layout as this rank of the student has it."""
    if relay.separate:
        join_load(config.teacher.folder)
        reader = build_reader(config, checked, groups, device)
        return SeparateTeacher(relay.layouts, reader, relay.payload_group, relay.orders)
    model = own_model(config, checked, relay, device)
    return RelaidTeacher(
        model, relay.layouts, build_reader(config, checked, groups, device), relay.payload_group
    )


def load_separate(config: Config, checked: Checked, relay: Relay, device: torch.device) -> MegatronTeacher:
    """The teacher on one of its own ranks, which joins in when the student's load theirs (`load_models`)."""
    model = own_model(config, checked, relay, device)
    for section in (config.reference, config.student):
        if section is not None:
            join_load(section.path)
    return model


def own_model(config: Config, checked: Checked, relay: Relay, device: torch.device) -> MegatronTeacher:
    """The teacher in its own layout, on one of its ranks."""
    arch, layout = checked.teacher, relay.layouts.teacher
    assert arch is not None
    padded = arch.padded_vocab_size(layout.tensor)
    chunks = load_gpt(arch, config.teacher.folder, layout, relay.groups, config.precision, padded, device)
    return megatron_teacher(config, checked, chunks, relay.groups, lends_head=False)


def build_reader(
    config: Config, checked: Checked, groups: ProcessGroupCollection, device: torch.device
) -> Reader:
    """What this rank of the student reads payloads with: on the last stage the teacher's head, where it is needed."""
    arch, tp = checked.teacher, groups.tp
    assert arch is not None
    form = payload_format(config, arch, checked.vocab_size)
    head_WD = None
    if reads_hidden_states(config) and groups.pp.rank() == groups.pp.size() - 1:
        head_WD = load_head(
            config.teacher.folder,
            arch,
            tp_rank=tp.rank(),
            tp_size=tp.size(),
            padded_vocab_size=checked.padded_vocab_size,
            dtype=form.dtype,
        ).to(device)
    return Reader(groups, form, head_WD, checked.padded_vocab_size // tp.size(), device)


def reads_hidden_states(config: Config) -> bool:
    """Whether a teacher's payloads are projected where the student is, for the loss or in evaluations."""
    return config.teacher.payload == "hidden_states" or config.evaluation.prompts is not None


def payload_format(config: Config, teacher: Architecture, vocab_size: int) -> PayloadFormat:
    """What a Megatron teacher of this architecture hands over, of `vocab_size` ids that all models have."""
    return PayloadFormat(
        config.teacher.payload,
        teacher.hidden_size,
        vocab_size,
        DTYPES[config.precision],
        k=config.objective.k,
        temperature=config.rollout.temperature,
    )


def served_teacher(config: Config, checked: Checked, groups: ProcessGroupCollection) -> SGLangTeacher:
    """The teacher behind servers, which are not known yet, with what the objective reads of it."""
    assert checked.served is not None
    return SGLangTeacher(
        groups,
        vocab_size=checked.served.vocab_size,
        k=served_k(config),
        request_tokens=config.teacher.request_tokens,
    )


def served_k(config: Config) -> int:
    """Of how many of its likeliest ids a teacher behind servers gives log-probs."""
    return config.objective.k if config.objective.support.startswith("teacher_topk") else 0


def cached_teacher(
    config: Config,
    checked: Checked,
    teacher: Teacher,
    layout: ParallelLayout,
    groups: ProcessGroupCollection,
    device: torch.device,
) -> CachedTeacher:
    """The same behind the files of `teacher.cache`. Collective over the student's ranks; one reads the weights.

    Reading them takes minutes where they are large, so the checksums are remembered in the cache's folder.
    """
    everyone, folder = all_ranks(groups), config.teacher.cache
    assert folder is not None
    found = [fingerprint(config.teacher.folder, known=folder / FINGERPRINTS) if everyone.rank() == 0 else ""]
    dist.broadcast_object_list(found, group=everyone, group_src=0)
    if checked.teacher is not None:
        form = payload_format(config, checked.teacher, checked.vocab_size)
    else:
        assert checked.served is not None
        k, vocab = served_k(config), checked.served.vocab_size
        form = PayloadFormat("topk" if k else "sampled", 0, vocab, DTYPES[config.precision], k=k)
    source = Source(found[0], engine_of(config.teacher), form)
    cache = PayloadCache(folder, source, max_bytes=1e9 * config.teacher.cache_gb, writers=groups.dp.size())
    return CachedTeacher(teacher, cache, groups, device, multiple=layout.microbatch_multiple)


def engine_of(teacher: TeacherConfig) -> str:
    """What runs the teacher, as part of the key of what it says; servers with the arguments that they are started by.

    What servers at `urls` do beyond the weights of `teacher.path`, such as to quantize them, is not known.
    """
    arguments = teacher.sglang.arguments if teacher.engine == "sglang" else []
    return " ".join([teacher.engine, *(json.dumps(each) for each in arguments)])
