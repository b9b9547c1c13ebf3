"""Hugging Face config -> megatron-core model.

- `families`: which Hugging Face tensors make up which megatron parameter; one file a family.
- `architecture`: what a Hugging Face `config.json` says, as one small dataclass; refuses what is not supported.
- `rope`: the rotary position embeddings, in every variant.
- `attention`: attention of packed sequences, under context parallelism too.
- `layers`: the layer spec (norm, residual), which needs no transformer-engine.
- `router`: which experts a token goes to, and the loss that balances them.
- `gpt`: `GPT`, the model every part of the package works with: it ends at the final norm and hands hidden states on.
- `lm_head`: hidden states -> this rank's logits shard.

Nothing here may import training, rollout, teacher or checkpoint.
"""
