"""Streaming passes over logits shards: statistics and gradient of a divergence, without big temporaries.

This file is the only place that chooses the implementation; `objectives` imports the names from here. A
faster implementation for one device has the signatures of `torch_streaming` and is picked here by the device
of the logits. Nothing in this folder may import anything of this project or of Megatron: torch only.
"""

from megatron_opd.kernels.torch_streaming import reverse_kl_gradient, reverse_kl_statistics, statistic_names

__all__ = ["reverse_kl_gradient", "reverse_kl_statistics", "statistic_names"]
