"""Mistral: Llama's tensors; early versions limit attention to a sliding window."""

from megatron_opd.models.families.rows import ATTENTION, FIRST, LAST, MLP, Family

FAMILY = Family("mistral", (FIRST, *ATTENTION, *MLP, *LAST), windowed=True)
