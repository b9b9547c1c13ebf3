"""Every key of a run's configuration: type, unit, default and range.

`Config` is a tree of frozen models, one for each section of the YAML file. Types are strict: a quoted number
is not a number, 1.0 is not an integer. A token is a token of the student's tokenizer. Paths may start with
`~`; relative paths are relative to the current directory, not to the file that names them.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _expand_home(path: Path) -> Path:
    return path.expanduser() if path.parts[:1] == ("~",) else path


LocalPath = Annotated[Path, Field(strict=False), AfterValidator(_expand_home)]
PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A section of the configuration: immutable, unknown keys refused, no silent conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Where a model lies."""

    path: LocalPath = Field(
        description="Folder of the model: Hugging Face, converted to Megatron, or a checkpoint of a run."
    )


class FrozenModelConfig(ModelConfig):
    """A model that is only run forward."""

    offload: bool = Field(
        False,
        description="Keep its weights, all but the LM head, in host memory while it does not run. Needs a GPU.",
    )


class ParallelConfig(Section):
    """How every model is spread over the processes. Processes needed: tensor * pipeline * context * data."""

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


class SGLangConfig(Section):
    """The SGLang servers of rollout.engine = sglang: started by the run (`python`), or running already (`urls`)."""

    python: LocalPath | None = Field(
        None,
        description="Interpreter of the environment that has SGLang; the run starts its servers with it.",
    )
    servers: PositiveInt = Field(1, description="Servers that the run starts, on the machine of rank 0.")
    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address that started servers listen at. Beyond this machine they ask for a key, made by the run.",
    )
    arguments: list[str] = Field(
        [], description="Further arguments of sglang.launch_server, one word an entry."
    )
    urls: list[Annotated[str, Field(pattern="^https?://[^/]+$")]] = Field(
        [],
        description="Servers that run already, such as http://node1:30000; their key, if any, is the environment "
        "variable SGLANG_API_KEY. They must see run_dir and serve the student's architecture.",
    )
    concurrency: PositiveInt = Field(
        64, description="Responses asked of a server at once, by each replica of the student."
    )
    request_timeout: float = Field(
        1800.0, gt=0, description="Seconds that one response may take; then another server is asked."
    )
    outage_timeout: float = Field(
        600.0,
        gt=0,
        description="Seconds that servers may take to start, and that the run waits when none works before it stops.",
    )


class RolloutConfig(Section):
    """What the student generates in a step."""

    engine: Literal["local", "sglang"] = Field(
        "local",
        description="local: the training processes themselves. sglang: SGLang servers, as the section `sglang` says.",
    )
    sglang: SGLangConfig = SGLangConfig()
    prompts_per_step: PositiveInt = Field(
        64, description="Prompts in a step, over all data-parallel replicas."
    )
    samples_per_prompt: PositiveInt = Field(1, description="Responses drawn for every prompt.")
    max_new_tokens: PositiveInt = Field(
        2048, description="Tokens of a response at most, its stop token included."
    )
    temperature: float = Field(
        1.0, gt=0, description="Divides the logits of rollout, student and teacher alike."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling: probability mass kept. 1 is off.")
    top_k: Count = Field(0, description="Number of likeliest tokens kept. 0 is off.")
    max_batch: PositiveInt | None = Field(
        None,
        description="Responses decoded together in a replica; bounds the key-value cache. null: all of a step. Read "
        "by the engine local.",
    )


class GateConfig(Section):
    """The tokens that get a top-K divergence instead of, or besides, the policy gradient."""

    kind: Literal["none", "aopd", "teacher_entropy"] = Field(
        "none",
        description="aopd: the divergence replaces the policy gradient where p_teacher - p_student <= tau. "
        "teacher_entropy: it is added where the teacher's entropy exceeds `threshold`.",
    )
    tau: float = Field(
        0.0, ge=-1, le=1, description="aopd: bound on p_teacher - p_student of the sampled token."
    )
    threshold: float = Field(0.8, ge=0, description="teacher_entropy: bound on the teacher's entropy, nats.")
    coefficient: float = Field(1.0, ge=0, description="Factor of the top-K divergence.")
    divergence: Literal["forward_kl", "reverse_kl"] = Field(
        "forward_kl", description="Which top-K divergence; `support`, `k` and `remainder` shape it."
    )


class PolicyConfig(Section):
    """The policy gradient on the sampled tokens."""

    clip_low: float | None = Field(
        0.2, ge=0, le=1, description="PPO: ratio to the old policy at least 1 - clip_low. null: no bound."
    )
    clip_high: float | None = Field(
        0.2, ge=0, description="PPO: ratio to the old policy at most 1 + clip_high. null: no bound."
    )
    dual_clip: float | None = Field(
        3.0, gt=1, description="Bound on the ratio of tokens with a negative advantage. null: none."
    )
    importance_cap: float | None = Field(
        5.0,
        gt=0,
        description="Bound on the importance weight against the rollout engine's log-probs. null: no weight. "
        "Read by the remainder sampled_tail too.",
    )
    discount: float = Field(
        0.0, ge=0, le=1, description="Of the rewards of later tokens: 0 is token-level, 1 sequence-level."
    )
    baseline: Literal["none", "reverse_kl"] = Field(
        "none", description="reverse_kl: subtract the expected reward of the token, minus its exact KL."
    )
    exact_step: bool = Field(
        False,
        description="The token's own reward enters as exact reverse KL, only later rewards are sampled.",
    )
    length_normalized: bool = Field(False, description="Divide every return by the number of its tokens.")


class ShapingConfig(Section):
    """The reward of a sampled token; by default log p_teacher - log p_student."""

    reference_weight: float = Field(
        1.0,
        ge=0,
        description="Factor of the teacher's log-prob gap to the model `reference` (ExOPD). 1 needs no reference.",
    )
    clip: float | None = Field(None, gt=0, description="Bound on the size of the reward, nats. null: none.")
    power: float | None = Field(
        None,
        gt=0,
        description="The reward is p_teacher^power - p_student^power. null: difference of logarithms.",
    )


class TokenWeightConfig(Section):
    """The weight of every response token in the loss: floor + gamma * s, s depending on `kind`."""

    kind: Literal[
        "uniform",
        "cumulative_share",
        "prefix_ratio",
        "prefix_window",
        "suffix_window",
        "curriculum",
        "linear_decay",
        "increasing",
    ] = Field(
        "uniform",
        description="uniform: weight 1. cumulative_share: s = 1 - share of |log-gap| before the token. "
        "prefix_ratio: (p_teacher / p_student)^alpha of the prefix. prefix_window, suffix_window: 1 inside. "
        "curriculum: prefix_window that grows to everything. linear_decay, increasing: by position.",
    )
    gamma: float = Field(0.5, ge=0, description="Strength of s.")
    floor: float = Field(1.0, ge=0, description="Weight where s is 0.")
    signed: bool = Field(False, description="cumulative_share: sums of the log-gap with its sign, clamped.")
    alpha: float = Field(0.1, ge=0, description="prefix_ratio: exponent of the ratio.")
    clip: float = Field(10.0, gt=0, description="prefix_ratio: s at most.")
    fraction: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Share of the response inside the window; curriculum's at the first step.",
    )
    unit_mean: bool = Field(
        False,
        description="Divide the weights by their mean over the response: the scale of the loss stays uniform's.",
    )


class MaskConfig(Section):
    """Response tokens that stay out of the loss; later tokens are still conditioned on them."""

    tokens: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="Tokens of the tokenizer, as it spells them, such as <|im_end|>."
    )
    occurrences: Literal["first", "all"] = Field(
        "first", description="Which occurrences of each of `tokens` in a response."
    )
    truncated: bool = Field(
        False,
        description="Leave out whole responses that reached rollout.max_new_tokens without a stop token.",
    )


class ObjectiveConfig(Section):
    """What is minimised: the mean over response tokens of token weight * divergence."""

    preset: str | None = Field(
        None, description="Named setting that fills the other keys of this section where they are not given."
    )
    divergence: Literal["reverse_kl", "forward_kl", "jsd", "policy_gradient"] = Field(
        "reverse_kl",
        description="reverse_kl: KL(student || teacher), nats. forward_kl: KL(teacher || student). jsd: between "
        "both. policy_gradient: of the sampled tokens, rewarded as `shaping` says.",
    )
    beta: float = Field(
        0.5, gt=0, lt=1, description="jsd: share of the teacher in the mixture that both are compared with."
    )
    support: Literal[
        "full", "teacher_topk", "student_topk", "teacher_topk_sampled", "student_topk_sampled"
    ] = Field(
        "full",
        description="Ids that the divergence sums over: the vocabulary, or the `k` likeliest ids of one model, "
        "optionally with the sampled token.",
    )
    k: PositiveInt = Field(32, description="Ids of a top-K support.")
    remainder: Literal["renormalize", "bucket", "none", "mass_correction", "sampled_tail"] = Field(
        "renormalize",
        description="What a top-K divergence does about the probability outside: renormalize without it, one "
        "bucket for it, nothing, a correction -p + q per id, an unbiased estimate from the sampled token.",
    )
    gate: GateConfig = GateConfig()
    policy: PolicyConfig = PolicyConfig()
    shaping: ShapingConfig = ShapingConfig()
    token_weight: TokenWeightConfig = TokenWeightConfig()
    mask: MaskConfig = MaskConfig()
    check: bool = Field(
        False,
        description="Stop with the name of the tensor when logits are not finite, instead of skipping the update.",
    )
    head_chunk: PositiveInt | None = Field(
        None,
        description="Tokens whose logits exist at once; less memory for more computation. null: all of a "
        "microbatch's.",
    )


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


class EvaluationConfig(Section):
    """Held-out reverse KL on the student's own rollouts, before the first step and after the last."""

    prompts: LocalPath | None = Field(
        None,
        description="Held-out prompts, a file or directory like `data.prompts`. null: no evaluation.",
    )
    every: Count = Field(
        0, description="Also evaluate every so many steps. 0: only before the first and after the last."
    )
    max_prompts: PositiveInt = Field(128, description="Prompts used: the first of the file.")


class CheckpointConfig(Section):
    """What is saved, and when."""

    save_every: Count = Field(50, description="Steps between two checkpoints. 0: only after the last step.")
    keep_last: PositiveInt = Field(2, description="Newest checkpoints kept; older ones are deleted.")
    export_hf: bool = Field(True, description="Write the final student as a Hugging Face folder too.")


class Config(Section):
    """The whole configuration of a run."""

    run_dir: LocalPath = Field(description="Directory that the run writes everything to, and resumes from.")
    seed: Count = Field(0, description="Seed of the order of the prompts and of the sampling noise.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16",
        description="Type of weights and activations. bf16 keeps float32 master weights in the optimizer.",
    )
    student: ModelConfig
    teacher: FrozenModelConfig
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
