"""What is planned: a checked configuration with its models and layout, and how many tokens a step has."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from megatron_opd.config.layout_checks import alignment_of_run
from megatron_opd.config.schema import Config
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import Architecture
from megatron_opd.models.gpt import DTYPES
from megatron_opd.objectives import Objective
from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.preflight import check_models, check_offload
from megatron_opd.teacher.payload import PayloadFormat
from megatron_opd.teacher.transport import Layouts
from megatron_opd.training.models import payload_format
from megatron_opd.training.relay import layout_of

Kernels = Literal["cpu", "torch", "transformer-engine"]
"""Which kernels a layer runs on: torch's on a CPU, torch's on a GPU, the same with transformer-engine's attention."""


@dataclass(frozen=True)
class Pack:
    """A packed microbatch. `padded` positions are those of attention, whose segments are padded to `longest`."""

    tokens: int
    loss_tokens: int
    padded: int
    longest: int


@dataclass(frozen=True)
class Workload:
    """What the fullest replica has to do in a step.

    Rollouts are dealt over the data- and context-parallel ranks, training over the data-parallel ones.
    """

    prompt: int  # tokens of a prompt
    response: int  # tokens of a response
    prompts: int  # that a generating replica draws responses to
    generated: int  # responses that it draws
    decoded_together: int  # at most
    responses: int  # of the step, over all replicas
    sequences: int  # that a training replica learns from
    updates: int  # optimizer updates
    microbatches: int  # of an update
    pack: Pack  # the mean of the microbatches
    fullest: Pack  # a microbatch filled to its budget, which the memory is planned for
    teacher_pack: Pack  # what the teacher reads of a mean microbatch
    teacher_fullest: Pack  # and of a full one

    @classmethod
    def of(cls, config: Config, layout: ParallelLayout) -> "Workload":
        """Every prompt and response as long as the configuration allows: an upper bound of memory and time.

        A sequence enters training without its last token. A microbatch holds as many whole sequences as fit its
        budget, with the student's prompts and the teacher's; for the memory it is full, as it is when lengths differ,
        unless the update has fewer tokens.
        """
        rollout, training = config.rollout, config.training
        prompt, response = config.data.max_prompt_tokens, rollout.max_new_tokens
        prompts = -(-rollout.prompts_per_step // (layout.data * layout.context))
        generated = prompts * rollout.samples_per_prompt
        responses = rollout.prompts_per_step * rollout.samples_per_prompt
        sequences = -(-responses // layout.data)
        alignment = alignment_of_run(config)
        length, theirs = (
            -(-(tokens + response - 1) // alignment) * alignment
            for tokens in (prompt, config.teacher_prompt_tokens)
        )
        of_update = -(-sequences // training.updates_per_rollout)
        fitting = max(1, training.microbatch_tokens // max(length, theirs))
        count, multiple = -(-of_update // fitting), layout.microbatch_multiple
        microbatches = -(-count // multiple) * multiple
        loss = of_update * response // microbatches

        def mean(length: int) -> Pack:
            tokens = of_update * length // microbatches
            return Pack(tokens, loss, tokens, length)

        def full(length: int) -> Pack:
            tokens = min(training.microbatch_tokens, of_update * length)
            return Pack(tokens, -(-tokens * response // length), tokens, length)

        return cls(
            prompt=prompt,
            response=response,
            prompts=prompts,
            generated=generated,
            decoded_together=min(rollout.max_batch or generated, generated),
            responses=responses,
            sequences=sequences,
            updates=training.updates_per_rollout,
            microbatches=microbatches,
            pack=mean(length),
            fullest=full(length),
            teacher_pack=mean(theirs),
            teacher_fullest=full(theirs),
        )


@dataclass(frozen=True)
class Setting:
    """A run on a kind of device. `layout.data` is filled in. What servers do is no part of it."""

    config: Config
    student: Architecture
    teacher: Architecture | None  # None: it is behind servers
    reference: Architecture | None
    objective: Objective
    layout: ParallelLayout
    workload: Workload
    vocab: int  # ids that all models have
    padded_vocab: int  # rows of every embedding and head
    kernels: Kernels
    processes: int  # of the whole run
    own_layout: ParallelLayout | None  # of the teacher; None: the student's
    lends_head: bool = True  # an offloaded model keeps its LM head on the device, for the objective

    @classmethod
    def of(cls, config: Config, processes: int, kernels: Kernels) -> "Setting":
        """Raises UserError for whatever a run with this configuration would be refused for before it starts, apart
        from what only its data and run directory can show."""
        checked = check_models(config, processes)
        if checked.teachers:
            raise UserError(
                "teacher.paths: what several teachers take is not planned: give teacher.path, the largest of them, to "
                "plan the run with it alone"
            )
        check_offload(config, gpu=kernels != "cpu", engine=kernels == "transformer-engine")
        layout, own = layout_of(checked.parallel), checked.teacher_parallel
        return cls(
            config=config,
            student=checked.student,
            teacher=checked.teacher,
            reference=checked.reference,
            objective=checked.objective,
            layout=layout,
            workload=Workload.of(config, layout),
            vocab=checked.vocab_size,
            padded_vocab=checked.padded_vocab_size,
            kernels=kernels,
            processes=processes,
            own_layout=None if own is None else layout_of(own),
        )

    def scored_pack(self, arch: Architecture) -> Pack:
        """What a model that scores reads of a mean microbatch."""
        return self.workload.teacher_pack if arch is self.teacher else self.workload.pack

    @property
    def separate(self) -> bool:
        """Whether the teacher has processes of its own."""
        own = self.config.teacher.parallel
        return self.own_layout is not None and own is not None and own.separate

    @property
    def teacher_here(self) -> bool:
        """Whether the teacher's passes run in this layout."""
        return self.teacher is not None and self.own_layout is None

    @cached_property
    def teaching(self) -> "Setting":
        """The setting of the teacher's passes alone, in its layout: all microbatches dealt over its replicas."""
        assert self.teacher is not None
        layout, padded = self.own_layout or self.layout, self.padded_vocab
        work = self.workload
        if self.own_layout is not None:
            padded = self.teacher.padded_vocab_size(layout.tensor)
            count, multiple = (
                -(-self.layout.data * work.microbatches // layout.data),
                layout.microbatch_multiple,
            )
            work = replace(work, microbatches=-(-count // multiple) * multiple)
        return replace(
            self,
            layout=layout,
            own_layout=None,
            lends_head=self.own_layout is None,
            reference=None,
            padded_vocab=padded,
            workload=work,
        )

    @cached_property
    def layouts(self) -> Layouts:
        """Both, as payloads are routed between them."""
        assert self.own_layout is not None
        return Layouts(self.layout, self.own_layout, self.layout.world_size if self.separate else 0)

    @property
    def last_stage(self) -> int:
        """The pipeline stage with the LM head."""
        return self.layout.pipeline - 1

    @property
    def payload(self) -> PayloadFormat | None:
        """What a teacher on the training processes hands over."""
        return None if self.teacher is None else payload_format(self.config, self.teacher, self.vocab)

    @property
    def teacher_projects(self) -> bool:
        """Whether a teacher on the training processes makes logits when it scores, and the objective none of it."""
        return self.payload is not None and self.payload.kind != "hidden_states"

    @property
    def own_rollouts(self) -> bool:
        """Whether the training processes draw the rollouts, and no servers."""
        return self.config.rollout.engine == "local"

    @property
    def served_ids(self) -> int:
        """Ids of a token whose log-probs a teacher behind servers gives, besides the sampled one's."""
        return self.config.objective.k if self.objective.support != "full" else 0

    @property
    def names_ids(self) -> bool:
        """Whether a teacher behind servers is asked for the student's likeliest ids, which a pass of it finds first."""
        return self.teacher is None and self.objective.support.startswith("student_topk")

    @property
    def vocab_shard(self) -> int:
        """Columns of a rank's logits."""
        return self.padded_vocab // self.layout.tensor

    @property
    def bytes_per_value(self) -> int:
        """Of weights and of most activations."""
        return DTYPES[self.config.precision].itemsize

    @property
    def data_ranks(self) -> int:
        """Ranks that hold the same dense weights and share their gradients: data times context parallel."""
        return self.layout.data * self.layout.context

    @property
    def expert_data_ranks(self) -> int:
        """Ranks that hold the same experts."""
        return self.layout.tensor * self.data_ranks // self.layout.expert
