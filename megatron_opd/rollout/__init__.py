"""Rollouts: the student draws responses to prompts.

- `sampling`: how a token is drawn from logits, and the noise it is drawn with.
- `local`: `LocalEngine`, which generates on the training ranks with the model's own weights.
- `decoder`, `feed_forward`, `kv_cache`, `projection`: the forward pass of one pipeline stage, with cached keys and
  values.
- `sharded`: the replicas (data x context parallel) each generate a share.

May import models, parallel and data; never training, teacher or checkpoint.
"""
