"""Llama 2, 3.x and everything built like them (SmolLM2, TinyLlama, ...)."""

from megatron_opd.models.families.rows import ATTENTION, FIRST, LAST, MLP, Family

FAMILY = Family("llama", (FIRST, *ATTENTION, *MLP, *LAST))
