"""Qwen2 and Qwen2.5: queries, keys and values have biases."""

from megatron_opd.models.families.rows import ATTENTION, FIRST, LAST, MLP, QKV_BIAS, Family

FAMILY = Family("qwen2", (FIRST, *ATTENTION, QKV_BIAS, *MLP, *LAST))
