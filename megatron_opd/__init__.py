"""On-policy distillation of language models on Megatron-Core."""
