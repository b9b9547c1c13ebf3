"""Cases of topk_divergence: every source of a support, and which settings go together."""

from __future__ import annotations

from typing import Any

import torch

from megatron_opd.objectives.topk import SUPPORTS
from tests.objectives.cases import Case, random_case

SOURCES = (*SUPPORTS, "server", "server_sampled")


def topk_case(source: str, k: int, seed: int = 0, count: int = 13, width: int = 96, **options: Any) -> Case:
    """Moderate logits, so that the rest outside the support is far above the last bit of 1.

    source is a support, or "server", then with "_sampled" or not: ids in any order and absent ones among them.
    """
    case = random_case(count, width, largest_scale=3.0, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    if options.get("remainder") == "sampled_tail":
        case.options["rollout_logprob"] = -6 * torch.rand(count, generator=generator, dtype=torch.float64)
        case.options["importance_cap"] = 2.0
    if not source.startswith("server"):
        case.options |= {"support": source, "k": k}
        return case
    case.options["support"] = source.replace("server", "teacher_topk")
    real = case.teacher[:, : case.vocab_size]
    best = real.sort(dim=1, descending=True, stable=True).indices[:, :k]
    for row in range(1, count, 2):
        best[row, int(torch.randint(1, best.shape[1] + 1, (), generator=generator)) :] = -1
    case.served = best[:, torch.randperm(best.shape[1], generator=generator)]
    return case


def allowed(setting: dict[str, Any]) -> bool:
    """Whether topk_divergence takes these together; the rest it refuses (test_topk.test_bad_arguments)."""
    tail = setting["remainder"] == "sampled_tail"
    return not tail or (setting["kind"] == "reverse_kl" and not setting["source"].endswith("_sampled"))
