"""Every key of a run's configuration: type, unit, default and range.

`Config` is a tree of frozen models, one for each section of the YAML file. Types are strict: a quoted number
is not a number, 1.0 is not an integer. A token is a token of the student's tokenizer. Paths may start with
`~`; relative paths are relative to the current directory, not to the file that names them.
"""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from megatron_opd.config.evaluation import EvaluationConfig
from megatron_opd.config.objective import ObjectiveConfig
from megatron_opd.config.rollout import RolloutConfig, SGLangConfig
from megatron_opd.config.section import Count, LocalPath, Name, PositiveInt, PositiveWeight, Section

PayloadKind = Literal["hidden_states", "logits", "topk", "sampled"]
SERVED_KINDS: tuple[PayloadKind, ...] = ("topk", "sampled")
"""Payloads that are log-probs of some ids, at the temperature of the rollouts."""

Seconds = Annotated[float, Field(gt=0)]


class ParallelConfig(Section):
    """How the models are spread over the processes. Processes needed: tensor * pipeline * context * data."""

    tensor: PositiveInt = Field(1, description="Processes that share the matrices of every layer (TP).")
    pipeline: PositiveInt = Field(1, description="Consecutive groups of layers, one a process (PP).")
    virtual_pipeline: PositiveInt = Field(
        1,
        description="Groups of layers each pipeline process holds, interleaved (VPP): less idle time, more traffic; "
        "needs pipeline > 1.",
    )
    context: PositiveInt = Field(1, description="Processes that share every sequence (CP).")
    data: PositiveInt | None = Field(
        None, description="Replicas of the model (DP). null: as many as the started processes allow."
    )
    sequence_parallel: bool = Field(
        False,
        description="Shard what lies between tensor-parallel regions along the sequence; needs tensor > 1.",
    )
    expert: PositiveInt = Field(
        1,
        description="Processes that share the experts of every layer among them (EP); they are taken from "
        "tensor * context * data, none are added.",
    )


class TeacherParallelConfig(ParallelConfig):
    """How a teacher with a layout of its own is spread, on the student's processes or on others."""

    data: PositiveInt | None = Field(
        None,
        description="Replicas of the teacher (DP). null: as many as the student's processes allow; with separate one.",
    )
    separate: bool = Field(
        False,
        description="On processes of its own, which the run has besides the student's: it scores while the student "
        "learns. false: on the student's processes, whose number its layout has to fill.",
    )


class ModelConfig(Section):
    """Where a model lies."""

    path: LocalPath = Field(
        description="Folder of the model: Hugging Face, converted to Megatron, or a checkpoint of a run."
    )


class OffloadConfig(Section):
    """Where the weights of models that are only run forward lie."""

    offload: bool = Field(
        False,
        description="Keep its weights, all but the LM head, in host memory while it does not run. Needs a GPU.",
    )


class FrozenModelConfig(OffloadConfig, ModelConfig):
    """A model that is only run forward."""


class TeacherConfig(OffloadConfig):
    """The teacher, or several: every other key then holds for each of them.

    Behind servers nothing of it is loaded here: of `path`, config.json and tokenizer are enough.
    """

    paths: dict[Name, LocalPath] = Field(
        {},
        description="Several teachers in the place of `path`: name and folder of each. They are used as `route_field` "
        "or `weights` says.",
    )
    path: LocalPath | None = Field(
        None,
        validate_default=True,
        description="Folder of the model: Hugging Face, converted to Megatron, or a checkpoint of a run.",
    )
    route_field: str | None = Field(
        None,
        min_length=1,
        description="Key of a prompt's line whose text is the name of its teacher in `paths`, which alone scores its "
        "responses; held-out prompts have it too.",
    )
    weights: dict[Name, PositiveWeight] = Field(
        {},
        description="Weight of each of `paths`, relative to their sum: every teacher scores every response, and the "
        "loss is the weighted mean of the losses with each alone.",
    )
    engine: Literal["megatron", "sglang"] = Field(
        "megatron",
        description="megatron: on the training processes, or as `parallel` says. sglang: SGLang servers, as the "
        "section `sglang` says, which give log-probs of single tokens: for policy_gradient or a support, at "
        "temperature 1 or renormalized.",
    )
    payload: PayloadKind = Field(
        "hidden_states",
        description="What the engine megatron hands over of each response token. hidden_states: for every objective. "
        "logits: of the whole vocabulary, for debugging. topk: log-probs of the sampled token and of its "
        "`objective.k` likeliest tokens, for a teacher_topk support. sampled: of the sampled token, for "
        "policy_gradient.",
    )
    parallel: TeacherParallelConfig | None = Field(
        None, description="Layout of its own, of the engine megatron. null: the student's."
    )
    prompt_template: str | None = Field(
        None,
        description="What the teacher reads in the place of the user's last message, with fields of the prompt's line "
        "in braces, each a text in every line: {prompt} (the name in `data.prompt_field`) is that message. {{ and }} "
        "are braces. null: what the student reads.",
    )
    max_prompt_tokens: PositiveInt | None = Field(
        None,
        description="Tokens of a prompt by `prompt_template`, chat template included. Prompts that become longer are "
        "dropped and counted. null: `data.max_prompt_tokens`.",
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of the teacher's weights towards the student's: after every update teacher = ema * teacher "
        "+ (1 - ema) * student, from the weights in `path` on. Costs 4 bytes a weight on every process. null: fixed.",
    )
    sglang: SGLangConfig = SGLangConfig()
    request_tokens: PositiveInt = Field(
        2048,
        description="Tokens of a response that a server scores in one request: bounds its memory for log-probs. Read "
        "by the engine sglang.",
    )
    cache: LocalPath | None = Field(
        None,
        description="Folder that keeps what the teacher says of each response: the same response is not scored again, "
        "in this run or another. All processes have to see it. Evaluations do not use it. What it depends on is the "
        "response's ids, the weights in `path` and `sglang.arguments`: servers in `sglang.urls` that are started "
        "otherwise, quantized say, need a folder of their own. null: nothing is kept.",
    )
    cache_gb: PositiveWeight = Field(
        100.0, description="Gigabytes that `cache` may hold, about; then what was written first is deleted."
    )

    @field_validator("path")
    @classmethod
    def _named(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        if path is None and info.data.get("paths") == {}:
            raise PydanticCustomError("missing", "there is no teacher")
        return path

    @property
    def folder(self) -> Path:
        """Of the one teacher."""
        assert self.path is not None, "there are several"
        return self.path

    @property
    def folders(self) -> dict[str, Path]:
        """Of every teacher, by the key that names it."""
        several = {f"teacher.paths.{name}": folder for name, folder in self.paths.items()}
        return several if self.path is None else {"teacher.path": self.path}


class DataConfig(Section):
    """The training prompts."""

    prompts: LocalPath = Field(description="JSONL file, or directory of JSONL files, with one prompt a line.")
    prompt_field: str = Field("prompt", min_length=1, description="Key of the prompt's text in a line.")
    max_prompt_tokens: PositiveInt = Field(
        1024, description="Tokens, chat template included. Longer prompts are dropped and counted."
    )
    system_prompt: str | None = Field(
        None,
        description="System message put before every prompt. null: what the chat template does by itself.",
    )
    shuffle: bool = Field(True, description="Draw the prompts in a new order every epoch, fixed by `seed`.")


class OptimizerConfig(Section):
    """The optimizer and its learning rate."""

    name: Literal["adam", "sgd"] = Field(
        "adam",
        description="adam: AdamW. sgd: weights minus rate times gradient, no momentum and no state; needs far larger "
        "learning rates.",
    )
    lr: float = Field(1e-6, gt=0, description="Learning rate after the warm-up.")
    min_lr: float = Field(
        0.0, ge=0, description="Learning rate that the schedule ends at; unused by `constant`."
    )
    warmup_steps: Count = Field(0, description="Steps over which the learning rate rises linearly to `lr`.")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="Course of the learning rate from the end of the warm-up to the last step."
    )
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled weight decay; not applied to norms and biases."
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="adam: decay of the mean of the gradient.")
    beta2: float = Field(0.95, ge=0, lt=1, description="adam: decay of the mean of the squared gradient.")
    eps: float = Field(1e-8, gt=0, description="adam: added to the denominator of the update.")
    clip_grad: float = Field(
        1.0, ge=0, description="Global gradient norm at which gradients are clipped. 0 is off."
    )
    distributed: bool | None = Field(
        None,
        description="Shard the optimizer's state over data- and context-parallel processes. null: adam's; sgd has "
        "none.",
    )
    cpu_offload: bool = Field(
        False,
        description="Keep the optimizer's state in host memory and update there. Needs a GPU and transformer-engine.",
    )

    @property
    def sharded(self) -> bool:
        """What `distributed` comes to. adam's state is sharded on one process too: it loads on any number."""
        return self.name == "adam" if self.distributed is None else self.distributed


class TrainingConfig(Section):
    """Length of the training and how a step is cut into microbatches."""

    steps: PositiveInt = Field(200, description="Steps of the whole run, each with rollouts of its own.")
    updates_per_rollout: PositiveInt = Field(
        1, description="Optimizer updates in a step, each on its own part of the rollouts."
    )
    microbatch_tokens: PositiveInt = Field(
        8192, description="Tokens (prompts and responses, padding included) of a packed microbatch at most."
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="Activations computed again in the backward pass: none, attention's, whole layers'.",
    )
    moe_aux_loss: float | None = Field(
        None,
        ge=0,
        description="Factor of the loss that balances the experts of the student; every layer adds 1 when balanced. "
        "null: what its config.json says (router_aux_loss_coef with output_router_logits, else 0).",
    )


class CheckpointConfig(Section):
    """What is saved, and when."""

    save_every: Count = Field(50, description="Steps between two checkpoints. 0: only after the last step.")
    keep_last: PositiveInt = Field(2, description="Newest checkpoints kept; older ones are deleted.")
    keep_every: Count = Field(
        0,
        description="Checkpoints of steps that it divides are kept for good; a multiple of save_every. 0: none.",
    )
    asynchronous: bool = Field(
        True,
        description="Write checkpoints from processes of their own while the training goes on: costs host memory, up "
        "to once more what a process saves. false: the training waits.",
    )
    export_hf: bool = Field(True, description="Write the final student as a Hugging Face folder too.")


class TimeoutsConfig(Section):
    """Seconds that a part of a step may take before the run ends as stuck, with the stacks of all processes.

    Time in which a process waits for others counts. Generous: what a run does should never come near them.
    """

    rollout: Seconds = Field(
        7200.0, description="The rollouts of a step. More than what servers may take: see rollout.sglang."
    )
    teacher: Seconds = Field(
        1800.0, description="The teacher's, the reference's and old log-probs of a step."
    )
    step: Seconds = Field(3600.0, description="The updates of a step; a separate teacher is waited for here.")
    sync: Seconds = Field(1800.0, description="New weights for servers, whose start the first one includes.")
    evaluation: Seconds = Field(
        7200.0,
        description="Held-out rollouts and their reverse KL, and tasks. In `evaluate`: responses drawn together.",
    )
    save: Seconds = Field(3600.0, description="A checkpoint, and the export of the last one.")

    @property
    def limits(self) -> dict[str, float]:
        """Phase -> seconds. `orders`: those in which a separate teacher waits for the student, which does all else."""
        phases: dict[str, float] = self.model_dump()
        return phases | {"orders": sum(phases.values())}

    @property
    def idle(self) -> timedelta:
        """What passes until a separate teacher's next order at most."""
        return timedelta(seconds=self.limits["orders"] + 300)

    @property
    def collective(self) -> timedelta:
        """What a collective may take: longer than any phase, so that it is the phase that is named."""
        return timedelta(seconds=max(self.model_dump().values()) + 300)


class Config(Section):
    """The whole configuration of a run."""

    run_dir: LocalPath = Field(description="Directory that the run writes everything to, and resumes from.")
    seed: Count = Field(0, description="Seed of the order of the prompts and of the sampling noise.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16",
        description="Type of weights and activations. bf16 keeps float32 master weights in the optimizer.",
    )
    student: ModelConfig
    teacher: TeacherConfig
    reference: FrozenModelConfig | None = Field(
        None, description="Third model, for objective.shaping.reference_weight. null: none."
    )
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()

    @property
    def teacher_prompt_tokens(self) -> int:
        """Tokens that the teacher reads before a response at most."""
        return self.teacher.max_prompt_tokens or self.data.max_prompt_tokens

    def with_teacher(self, name: str) -> "Config":
        """The same with one of several teachers alone."""
        one = {"path": self.teacher.paths[name], "paths": {}, "route_field": None, "weights": {}}
        return self.model_copy(update={"teacher": self.teacher.model_copy(update=one)})
