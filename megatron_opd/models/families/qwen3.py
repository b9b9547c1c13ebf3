"""Qwen3 (dense): queries and keys are normalised per head."""

from megatron_opd.models.families.rows import ATTENTION, FIRST, LAST, MLP, QK_NORMS, Family

FAMILY = Family("qwen3", (FIRST, *ATTENTION, *QK_NORMS, *MLP, *LAST))
