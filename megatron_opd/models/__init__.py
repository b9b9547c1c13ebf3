"""Hugging Face config -> megatron-core model.

- `architecture`: what a Hugging Face `config.json` says, as one small dataclass; refuses what is not supported.
- `layers`: the layer spec without transformer-engine (norm, residual, attention of packed sequences).
- `gpt`: `GPT`, the model every part of the package works with: it ends at the final norm and hands hidden states on.
- `lm_head`: hidden states -> this rank's logits shard.

Nothing here may import training, rollout, teacher or checkpoint.
"""
