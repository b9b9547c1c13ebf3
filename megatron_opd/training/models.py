"""The models of a run: student, teacher and reference, with their weights."""

from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opd.checkpoint.weights import load_model_weights
from megatron_opd.config.schema import Config
from megatron_opd.models.architecture import Architecture
from megatron_opd.models.gpt import DTYPES, GPT, build_gpt
from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.preflight import Checked
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.teacher.payload import PayloadFormat
from megatron_opd.teacher.sglang import SGLangTeacher


def load_models(
    config: Config,
    checked: Checked,
    layout: ParallelLayout,
    groups: ProcessGroupCollection,
    device: torch.device,
) -> tuple[list[GPT], MegatronTeacher | SGLangTeacher, MegatronTeacher | None]:
    """Student, teacher and, where there is one, reference with their weights, in one layout.

    Nothing is loaded of a teacher behind servers. All vocabularies are padded to the same size.
    """
    padded = checked.padded_vocab_size

    def load(arch: Architecture, folder: Path, recompute: str = "none") -> list[GPT]:
        chunks = build_gpt(
            arch,
            layout,
            groups,
            precision=config.precision,
            padded_vocab_size=padded,
            recompute=recompute,
        )
        load_model_weights(chunks, arch, folder, groups=groups, padded_vocab_size=padded)
        return [chunk.to(device) for chunk in chunks]

    teacher: MegatronTeacher | SGLangTeacher
    if checked.teacher is None:
        teacher = served_teacher(config, checked, groups)
    else:
        chunks = load(checked.teacher, config.teacher.path)
        form = payload_format(config, checked.teacher, checked.vocab_size)
        teacher = MegatronTeacher(
            chunks, groups, form=form, head_chunk=config.objective.head_chunk, offload=config.teacher.offload
        )
    reference = None
    if config.reference is not None and checked.reference is not None:
        reference = MegatronTeacher(
            load(checked.reference, config.reference.path), groups, offload=config.reference.offload
        )
    trained = checked.student.with_aux_loss(config.training.moe_aux_loss)
    return load(trained, config.student.path, config.training.recompute), teacher, reference


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
        k=config.objective.k if config.objective.support.startswith("teacher_topk") else 0,
        request_tokens=config.teacher.request_tokens,
    )
