"""Hugging Face config -> megatron-core model.

- `families`: which Hugging Face tensors make up which megatron parameter; one file a family.
- `architecture`: what a Hugging Face `config.json` says, as one small dataclass; refuses what is not supported.
- `rope`: the rotary position embeddings, in every variant.
- `layers`: the layer spec without transformer-engine (norm, residual, attention of packed sequences).
- `router`: which experts a token goes to, and the loss that balances them.
- `gpt`: `GPT`, the model every part of the package works with: it ends at the final norm and hands hidden states on.
- `lm_head`: hidden states -> this rank's logits shard.

Nothing here may import training, rollout, teacher or checkpoint.
"""
