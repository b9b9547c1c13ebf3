"""Which settings of an objective go together: the validated table.

Two kinds of mistakes are refused. Settings that contradict each other or make the loss vanish, and settings
that differ from their default although nothing reads them, for then the run is not what its author thinks.
Ranges of single values are checked by the settings themselves (`Gate`, `PolicyGradient`, ...).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron_opd.objectives.shard import DIVERGENCE_KINDS
from megatron_opd.objectives.token_weights import TOKEN_WEIGHT_FIELDS
from megatron_opd.objectives.topk import REMAINDERS
from megatron_opd.objectives.topk import SUPPORTS as TOPK_SUPPORTS

if TYPE_CHECKING:
    from megatron_opd.objectives.objective import Objective

DIVERGENCES = (*DIVERGENCE_KINDS, "policy_gradient")
SUPPORTS = ("full", *TOPK_SUPPORTS)
SAMPLED_UNIONS = tuple(support for support in TOPK_SUPPORTS if support.endswith("_sampled"))


def check_combination(objective: Objective) -> None:
    """Raises ValueError for settings that make no sense together.

    The message is one line: the field at fault as `objective` names it (`gate.tau`), what is wrong, the
    remedy.

    | setting | goes with |
    |---|---|
    | `beta` | divergence jsd; 0 < beta < 1 |
    | `support` full | every divergence without a gate |
    | `support` teacher_topk, student_topk, either with _sampled | reverse_kl, forward_kl; policy_gradient with a gate |
    | `k`, `remainder` | those supports; k = 1 does not renormalize unless the sampled token is in the support |
    | `remainder` sampled_tail | reverse_kl (of the gate, if there is one); a support without _sampled |
    | `gate.kind` aopd, teacher_entropy | policy_gradient |
    | `gate.tau`; `gate.threshold` | aopd; teacher_entropy |
    | `gate.coefficient`, `gate.divergence` | any gate |
    | `policy.*`, `shaping.*` | policy_gradient |
    | `policy.baseline` | no shaping, no length_normalized: it is the expected plain reward |
    | `policy.exact_step` | discount > 0, no gate, no baseline, no shaping |
    | `policy.length_normalized` | discount > 0 |
    | `shaping.power` | no `shaping.clip` (`Shaping` refuses a reference weight) |
    | `policy.importance_cap` | remainder sampled_tail too |
    | a served teacher | see `_check_served` |
    | `token_weight.*` | the kinds that read it (`TOKEN_WEIGHT_FIELDS`); not all weights 0 |
    """
    _check_names(objective)
    _check_support(objective)
    if _reads_topk(objective):
        _check_remainder(objective)
    if objective.divergence == "policy_gradient":
        _check_policy(objective)
    _check_token_weight(objective)
    if objective.served:
        _check_served(objective)
    _check_all_read(objective)


def _reads_topk(objective: Objective) -> bool:
    return objective.support != "full"


def _gated(objective: Objective) -> bool:
    return objective.gate.kind != "none"


def _check_names(objective: Objective) -> None:
    for key, value, known in (
        ("divergence", objective.divergence, DIVERGENCES),
        ("support", objective.support, SUPPORTS),
        ("remainder", objective.remainder, REMAINDERS),
    ):
        if value not in known:
            raise ValueError(f"{key}: unknown {value!r}: use one of {', '.join(known)}")


def _check_support(objective: Objective) -> None:
    """Divergence, gate and support."""
    divergence, support, gate = objective.divergence, objective.support, objective.gate.kind
    if _gated(objective) and divergence != "policy_gradient":
        raise ValueError(
            f"gate.kind: {gate} needs divergence policy_gradient, not {divergence}: set that, or set "
            "gate.kind to none"
        )
    if _gated(objective) and objective.gate.coefficient == 0.0:
        raise ValueError(
            f"gate.coefficient: 0 leaves nothing of what gate {gate} adds: raise it, or set gate.kind to none"
        )
    if _gated(objective) and support == "full":
        raise ValueError(
            f"support: gate {gate} adds a top-K divergence, and full is not top-K: set support to teacher_topk"
        )
    if divergence == "policy_gradient" and not _gated(objective) and support != "full":
        raise ValueError(
            f"support: {support} has no effect, policy_gradient without a gate looks at the sampled token "
            "alone: set support to full, or set gate.kind"
        )
    if divergence == "jsd" and support != "full":
        raise ValueError(
            f"support: jsd needs the whole vocabulary, not {support}: set support to full, or divergence to "
            "reverse_kl or forward_kl"
        )
    if divergence == "jsd" and not 0.0 < objective.beta < 1.0:
        raise ValueError(
            f"beta: must lie between 0 and 1, not {objective.beta:g}: its limits are divergence forward_kl "
            "(towards 0) and reverse_kl (towards 1)"
        )


def _check_remainder(objective: Objective) -> None:
    """K and the remainder of a top-K divergence."""
    support, remainder, k = objective.support, objective.remainder, objective.k
    where = "gate.divergence" if _gated(objective) else "divergence"
    divergence = objective.gate.divergence if _gated(objective) else objective.divergence
    if k < 1:
        raise ValueError(f"k: must be at least 1, not {k}")
    if k == 1 and remainder == "renormalize" and support not in SAMPLED_UNIONS:
        raise ValueError(
            "k: 1 with remainder renormalize has zero loss and gradient, for both models give probability 1 "
            "to a single id: raise k, or set remainder to bucket"
        )
    if remainder == "sampled_tail" and divergence != "reverse_kl":
        raise ValueError(
            f"remainder: sampled_tail needs a reverse_kl divergence, not {divergence}: set {where} to "
            "reverse_kl, or remainder to bucket"
        )
    if remainder == "sampled_tail" and support in SAMPLED_UNIONS:
        raise ValueError(
            f"remainder: sampled_tail never applies with support {support}, which holds every sampled token: "
            f"set support to {support.removesuffix('_sampled')}, or remainder to bucket"
        )


def _check_policy(objective: Objective) -> None:
    """The settings of the policy gradient and the shape of its reward."""
    policy, shaping = objective.policy, objective.shaping
    if policy.length_normalized and policy.discount == 0.0:
        raise ValueError(
            "policy.length_normalized: with discount 0 a return is a single reward: set policy.discount "
            "above 0, or policy.length_normalized to false"
        )
    if policy.exact_step and policy.discount == 0.0:
        raise ValueError(
            "policy.exact_step: with discount 0 no reward is left to the estimator: set policy.discount above "
            "0, or use divergence reverse_kl, which is the exact step"
        )
    if policy.exact_step and _gated(objective):
        raise ValueError(
            f"policy.exact_step: does not combine with gate {objective.gate.kind}, whose divergence is a second "
            "exact term: set policy.exact_step to false, or gate.kind to none"
        )
    if policy.exact_step and policy.baseline != "none":
        raise ValueError(
            f"policy.baseline: {policy.baseline} is the expected reward of the token that exact_step takes "
            "out of the return: set policy.baseline to none, or policy.exact_step to false"
        )
    shaped = [key for key, _, _ in _changed(shaping)]
    if policy.baseline != "none" and (shaped or policy.length_normalized):
        other = f"shaping.{shaped[0]}" if shaped else "policy.length_normalized"
        raise ValueError(
            f"policy.baseline: {policy.baseline} is the expected reward without {other}: set policy.baseline to "
            f"none, or leave {other} at its default"
        )
    if policy.exact_step and shaped:
        raise ValueError(
            f"shaping.{shaped[0]}: exact_step computes the unshaped reward of its token: leave shaping at its "
            "defaults, or set policy.exact_step to false"
        )
    if shaping.power is not None and shaping.clip is not None:
        raise ValueError(
            "shaping.power: does not combine with shaping.clip, its reward is bounded: leave one of them at null"
        )


def _check_token_weight(objective: Objective) -> None:
    """Some token has to have a weight."""
    weight = objective.token_weight
    windows = ("prefix_window", "suffix_window", "curriculum")
    flat = weight.gamma == 0.0 or (weight.kind in windows and weight.fraction == 0.0)
    if weight.kind != "uniform" and weight.floor == 0.0 and flat:
        at_fault = "gamma" if weight.gamma == 0.0 else "fraction"
        raise ValueError(
            f"token_weight.{at_fault}: 0 with token_weight.floor 0 makes every weight 0: raise one of them"
        )


def _check_served(objective: Objective) -> None:
    """What log-probs of single ids are enough for."""
    divergence, policy, gate = objective.divergence, objective.policy, objective.gate.kind
    served = "a teacher that hands over log-probs of single tokens does not give"
    if objective.kept_ids_only:
        raise ValueError(f"kept_ids_only: needs log-probs of every kept id, which {served}: set it to false")
    if divergence != "policy_gradient" and objective.support == "full":
        raise ValueError(
            f"support: {divergence} over the full vocabulary needs all logits, which {served}: use policy_gradient, "
            "or reverse_kl or forward_kl with support teacher_topk"
        )
    if gate == "teacher_entropy":
        raise ValueError(
            f"gate.kind: {gate} needs an entropy over the full vocabulary, which {served}: set it to aopd or none"
        )
    if policy.baseline != "none":
        raise ValueError(
            f"policy.baseline: {policy.baseline} is over the full vocabulary, which {served}: set it to none"
        )
    if policy.exact_step:
        raise ValueError(
            f"policy.exact_step: needs a divergence over the full vocabulary, which {served}: set it to false"
        )
    if not objective.knows_gaps:
        _check_scaled(objective)


def _check_scaled(objective: Objective) -> None:
    """At another temperature than theirs the teacher's log-probs are known up to a constant of each token."""
    remedy = f"or the temperature of the rollouts to {objective.served_at:g}, at which the server scores"
    if objective.divergence == "policy_gradient":
        raise ValueError(
            "divergence: policy_gradient reads the teacher's log-prob of the sampled token: set divergence to "
            f"reverse_kl with support teacher_topk and remainder renormalize, {remedy}"
        )
    if objective.remainder != "renormalize":
        raise ValueError(
            f"remainder: {objective.remainder} reads the teacher's probabilities: set it to renormalize, {remedy}"
        )
    if objective.token_weight.kind in ("cumulative_share", "prefix_ratio"):
        raise ValueError(
            f"token_weight.kind: {objective.token_weight.kind} reads the teacher's log-prob of the sampled token: set "
            f"it to uniform, {remedy}"
        )


def _check_all_read(objective: Objective) -> None:
    """Refuses what differs from its default and has no reader."""
    for key, value, default, readers in _unread(objective):
        raise ValueError(
            f"{key}: {_shown(value)} is read with {readers} only: leave it at {_shown(default)}, or use that"
        )


def _unread(objective: Objective) -> Iterator[tuple[str, Any, Any, str]]:
    """(field, value, default, who reads it) of every field that is set in vain."""
    readers = {}
    if objective.divergence != "jsd":
        readers["beta"] = "divergence jsd"
    if not _reads_topk(objective):
        readers["k"] = readers["remainder"] = "a top-K support"
    for key, value, default in _changed(objective):
        if key in readers:
            yield key, value, default, readers[key]

    gates: dict[str, tuple[str, ...]] = {"tau": ("aopd",), "threshold": ("teacher_entropy",)}
    for key, value, default in _changed(objective.gate):
        kinds = gates.get(key, ("aopd", "teacher_entropy"))
        if key != "kind" and objective.gate.kind not in kinds:
            yield f"gate.{key}", value, default, f"gate.kind {' or '.join(kinds)}"

    if objective.divergence != "policy_gradient":
        for section in ("policy", "shaping"):
            for key, value, default in _changed(getattr(objective, section)):
                if (key, objective.remainder) != ("importance_cap", "sampled_tail"):
                    yield f"{section}.{key}", value, default, "divergence policy_gradient"

    for key, value, default in _changed(objective.token_weight):
        if key != "kind" and key not in TOKEN_WEIGHT_FIELDS[objective.token_weight.kind]:
            kinds = tuple(kind for kind, fields in TOKEN_WEIGHT_FIELDS.items() if key in fields)
            yield f"token_weight.{key}", value, default, f"token_weight.kind {' or '.join(kinds)}"


def _changed(settings: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, default) of the fields of a dataclass that differ from their default."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            yield field.name, value, field.default


def _shown(value: Any) -> str:
    """As one writes it in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
