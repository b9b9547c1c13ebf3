"""Tokenizer and prompts of a run, read and checked before anything is built."""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_opd.config.schema import Config
from megatron_opd.data.loss_mask import LossMask, build_loss_mask
from megatron_opd.data.prompts import LoadedPrompts, Prompt, TeacherPrompt, load_prompts
from megatron_opd.data.routes import check_all_teach, routed
from megatron_opd.data.tokenizer import check_same_tokenizer, load_tokenizer, stop_ids
from megatron_opd.errors import UserError
from megatron_opd.evaluation.tasks import Task


@dataclass(frozen=True)
class Texts:
    """Tokenizer and prompts of a run. `vocab_size` is the vocabulary that student and teacher share."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    stop_ids: tuple[int, ...]
    mask: LossMask
    training: LoadedPrompts
    heldout: list[Prompt]
    notes: list[str]  # what the user should know, a line each
    tasks: list[Task] = field(default_factory=list)

    @property
    def evaluated(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self.heldout or self.tasks)


def read_texts(config: Config, vocab_size: int) -> Texts:
    """Read tokenizers and prompts. Raises UserError when the tokenizers differ or a prompt file is broken."""
    tokenizer = load_tokenizer(config.student.path)
    others = config.teacher.folders | ({"reference.path": config.reference.path} if config.reference else {})
    warnings = [check_same_tokenizer(tokenizer, load_tokenizer(path), key) for key, path in others.items()]
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"student.path: the tokenizer has {len(tokenizer)} tokens, the models only {vocab_size} rows: "
            "use the tokenizer that belongs to the models"
        )

    template = config.teacher.prompt_template
    teacher = None if template is None else TeacherPrompt(template, config.teacher_prompt_tokens)
    teachers, field = config.teacher.paths, config.teacher.route_field

    def load(path: Path) -> LoadedPrompts:
        loaded = load_prompts(
            path,
            tokenizer,
            field=config.data.prompt_field,
            max_prompt_tokens=config.data.max_prompt_tokens,
            system_prompt=config.data.system_prompt,
            teacher=teacher,
        )
        return loaded if field is None else routed(loaded, path, field, teachers)

    training = load(config.data.prompts)
    if field is not None:
        check_all_teach(training.prompts, teachers)
    heldout = load(config.evaluation.prompts) if config.evaluation.prompts is not None else None
    notes = [
        *(warning for warning in warnings if warning),
        *training.notes,
        *(heldout.notes if heldout else []),
    ]
    return Texts(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        stop_ids=stop_ids(config.student.path, tokenizer),
        mask=build_loss_mask(config.objective.mask, tokenizer),
        training=training,
        heldout=heldout.prompts[: config.evaluation.max_prompts] if heldout else [],
        notes=notes,
    )
