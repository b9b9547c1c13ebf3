"""The keys of the objective: divergence, policy gradient, gate, reward, token weight and mask."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_opd.config.section import PositiveInt, Section


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
    kept_ids_only: bool = Field(
        False,
        description="Restrict student and teacher, token by token, to the ids that rollout.top_p and rollout.top_k "
        "left to draw from, and renormalise: the student is then the policy that drew. Metrics are of these ids, but "
        "for eval/reverse_kl.",
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
