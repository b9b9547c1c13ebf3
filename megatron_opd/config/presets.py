"""Named settings of the objective, for `objective.preset`; keys that are given beside it win.

A preset holds what the paper (or the authors' code, where that says more) fixes about the loss. What lies
outside the section `objective` has to be given too; most of it, batch and learning rate first, depends on the
models. Unless the table says otherwise it is one update per rollout batch, temperature 1, top_p 1.

| preset | source | outside the section `objective`, as published |
|---|---|---|
| opd | Thinking Machines' blog; baseline of 2606.22600 | lr 1e-5, 1024 prompts a step, 1 sample |
| iw-opd | IW-OPD, arXiv 2606.22600, Eq. 17 and its code | the same |
| iw-opd-exact | ours, see below | |
| lsm | Revisiting OPD, 2603.25562, Eq. 8 | rollout.top_p 0.9, lr 2e-6, 128 rollouts, training.updates_per_rollout 2 |
| aopd | AOPD, 2605.06387, Eq. 9-10 and its code | lr 1e-5, 512 prompts a step, training.updates_per_rollout 2 |
| gkd | GKD, 2306.13649, on-policy part (its lambda = 1) | |
| eopd | Entropy-aware OPD, 2603.07079 | |
| exopd | G-OPD/ExOPD, 2602.12125 | `reference`: the student's start, or the teacher's base before its RL |
| mopd | MOPD, 2606.30406, its top-K form | 2048 prompts a step, 1 sample |
| minillm | MiniLLM, 2306.08543 | |
| poweropd | PowerOPD, 2606.17199, and its code | rollout.top_p 0.95, lr 5e-7, rollout.max_new_tokens 1024 |

Where a preset is not all of its method, or the source leaves something open:

- `iw-opd-exact`: the weight of IW-OPD on reverse KL over the full vocabulary, summed exactly instead of
  estimated from the sampled token. The paper's own estimator is the sampled-token policy gradient.
- `lsm`: the mask of special tokens that the paper combines with it is `mask.tokens: ["<", think, <|im_end|>]`
  for Qwen models; it depends on the tokenizer.
- `aopd`: the plain sum over the teacher's 32 best ids, as the code has it; the paper's text divides it by 32.
- `aopd`, `eopd`, `minillm`, `poweropd`: no importance weights against the rollout engine, for no source names any.
- `eopd`: the number of the teacher's ids and the dual clip were not found; 32 and 3 are ours.
- `exopd`: refused without `reference`.
- `mopd`: one teacher; routing prompts to several is not part of it.
- `minillm`: neither its teacher-mixed sampling (share 0.2) nor its language-model loss on data is part of it.
- `gkd`, `aopd`: the papers average over each response first; here every token of the update counts the same.
- `poweropd`: power 5 is the authors' main script's. The code also masks the stop token (`mask.tokens`) and has no
  PPO clip, which does not act either as long as there is one update per rollout batch.
"""

from typing import Any

from megatron_opd.config.names import did_you_mean
from megatron_opd.errors import UserError

_CUMULATIVE_SHARE: dict[str, Any] = {"kind": "cumulative_share", "gamma": 0.5}
_PPO: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0, "discount": 0.0}
_SAMPLED_TOKEN: dict[str, Any] = {
    "divergence": "policy_gradient",
    "policy": {**_PPO, "importance_cap": 5.0},
}
_UNCORRECTED_TOKEN: dict[str, Any] = {  # no importance weights
    "divergence": "policy_gradient",
    "policy": {**_PPO, "importance_cap": None},
}

PRESETS: dict[str, dict[str, Any]] = {
    "opd": _SAMPLED_TOKEN,
    "iw-opd": {**_SAMPLED_TOKEN, "token_weight": _CUMULATIVE_SHARE},
    "iw-opd-exact": {"divergence": "reverse_kl", "token_weight": _CUMULATIVE_SHARE},
    "lsm": {
        "divergence": "reverse_kl",
        "support": "teacher_topk",
        "k": 32,
        "remainder": "renormalize",
    },
    "aopd": {
        **_UNCORRECTED_TOKEN,
        "gate": {"kind": "aopd", "tau": 0.0, "coefficient": 1.0, "divergence": "forward_kl"},
        "support": "teacher_topk",
        "k": 32,
        "remainder": "none",
    },
    "gkd": {"divergence": "jsd", "beta": 0.5, "support": "full"},
    "eopd": {
        **_UNCORRECTED_TOKEN,
        "gate": {
            "kind": "teacher_entropy",
            "threshold": 0.8,
            "coefficient": 1.0,
            "divergence": "forward_kl",
        },
        "support": "teacher_topk",
        "k": 32,
        "remainder": "none",
    },
    "exopd": {**_SAMPLED_TOKEN, "shaping": {"reference_weight": 1.25}},
    "mopd": {
        "divergence": "reverse_kl",
        "support": "teacher_topk",
        "k": 64,
        "remainder": "mass_correction",
    },
    "minillm": {
        "divergence": "policy_gradient",
        "policy": {
            "clip_low": 0.2,
            "clip_high": 0.2,
            "dual_clip": None,
            "importance_cap": None,
            "discount": 1.0,
            "exact_step": True,
            "length_normalized": True,
        },
    },
    "poweropd": {**_UNCORRECTED_TOKEN, "shaping": {"power": 5.0}},
}


def preset_objective(name: str) -> dict[str, Any]:
    """The keys of the `objective` section that preset `name` sets. Raises UserError for an unknown name."""
    if name not in PRESETS:
        known = ", ".join(sorted(PRESETS))
        hint = did_you_mean(name, list(PRESETS)) or f": the presets are {known}"
        raise UserError(f"objective.preset: unknown preset '{name}'{hint}")
    return PRESETS[name]
