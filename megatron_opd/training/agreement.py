"""Whether rollout engine and training engine give the sampled tokens the same probability: measured every step.

Both should, up to rounding, as long as the student is the one that drew: so the student's log-probs are compared before
it moves. The metrics, per token d = log p_training - log p_rollout in nats:

    logprob_mismatch       mean |d|
    logprob_mismatch_max   largest |d|
    logprob_mismatch_kl    mean of exp(d) - 1 - d: never negative, and where tokens were drawn without a cut an
                           unbiased estimate of KL(rollout || training)
    logprob_mismatch_high  share of tokens with |d| above `rollout.mismatch_threshold`, NaN included

Of the log-probs before top-p and top-k; with objective.kept_ids_only, where the student is computed on the kept ids
alone, of those after it. Rollouts of older weights differ by what the student has learned since, too.

What is normal: two bf16 passes over 384 tokens of SmolLM2-135M, with a cache and without, gave mean 0.04, largest 0.27
and 1.6 % above 0.2 nats; float32 gives 1e-6. A temperature of 0.8 taken for 1 puts 21 % above 0.5, the weights of
another model 91 %. The defaults, 2 % above 0.5, lie between.

Shape suffix: N loss positions of a microbatch.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_opd.config.rollout import RolloutConfig

SUMS = ("logprob_mismatch", "logprob_mismatch_kl", "logprob_mismatch_high", "compared_tokens")
MAXIMA = ("logprob_mismatch_max",)


def agreement(student_N: Tensor | None, rollout_N: Tensor, threshold: float) -> dict[str, Tensor]:
    """`SUMS` over these tokens and `MAXIMA`, detached float64 scalars; zeros where the student has moved (None)."""
    if student_N is None:
        return dict.fromkeys((*SUMS, *MAXIMA), torch.zeros((), dtype=torch.float64, device=rollout_N.device))
    gap_N = student_N.detach().double() - rollout_N.double()
    return {
        "logprob_mismatch": gap_N.abs().sum(),
        "logprob_mismatch_kl": (gap_N.expm1() - gap_N).sum(),
        "logprob_mismatch_high": (~(gap_N.abs() <= threshold)).double().sum(),
        "compared_tokens": torch.full_like(gap_N, 1.0).sum(),
        "logprob_mismatch_max": gap_N.abs().amax() if len(gap_N) else gap_N.sum(),
    }


def step_agreement(updates: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of a step from those of its updates; empty where no token could be compared."""
    tokens = sum(update["compared_tokens"] for update in updates)
    if not tokens:
        return {}
    means = {name: sum(update[name] for update in updates) / tokens for name in SUMS[:-1]}
    return means | {name: max(update[name] for update in updates) for name in MAXIMA}


def alarm(metrics: Mapping[str, float], rollout: RolloutConfig) -> str | None:
    """One line for the user when the engines disagree on more tokens than `rollout.mismatch_alarm` allows."""
    share, allowed = metrics.get("logprob_mismatch_high"), rollout.mismatch_alarm
    if share is None or allowed is None or share <= allowed:
        return None
    causes = "precision, server arguments" if rollout.engine == "sglang" else "precision"
    if rollout.max_staleness:
        causes += f", the {rollout.max_staleness} steps that rollouts may be old"
    return (
        f"rollout and training disagree: log-probs of {share:.1%} of the tokens differ by more than "
        f"{rollout.mismatch_threshold:g} nats (rollout.mismatch_alarm {allowed:.1%}; mean "
        f"{metrics['logprob_mismatch']:.3g}, largest {metrics['logprob_mismatch_max']:.3g}, KL "
        f"{metrics['logprob_mismatch_kl']:.3g}): look at {causes}, and whether the weights are those of this step"
    )
