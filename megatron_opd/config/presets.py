"""Named settings of the objective, for `objective.preset`.

- `iw-opd-exact`: reverse KL over the full vocabulary, summed exactly instead of estimated from the sampled
  token, times the cumulative-share token weight of IW-OPD (arXiv:2606.22600) with gamma = 0.5: w_t = 1 +
  gamma * (1 - sum_{k<t} |A_k| / sum_k |A_k|), A_k the log-gap of teacher and student at the sampled token.
  The paper's own estimator is the sampled-token policy gradient; the exact divergence under its weight is
  ours.
"""

from typing import Any

from megatron_opd.config.names import did_you_mean
from megatron_opd.errors import UserError

PRESETS: dict[str, dict[str, Any]] = {
    "iw-opd-exact": {
        "divergence": "reverse_kl",
        "token_weight": {"kind": "cumulative_share", "gamma": 0.5},
    },
}


def preset_objective(name: str) -> dict[str, Any]:
    """The keys of the `objective` section that preset `name` sets. Raises UserError for an unknown name."""
    if name not in PRESETS:
        known = ", ".join(sorted(PRESETS))
        hint = did_you_mean(name, list(PRESETS)) or f": the presets are {known}"
        raise UserError(f"objective.preset: unknown preset '{name}'{hint}")
    return PRESETS[name]
