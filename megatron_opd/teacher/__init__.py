"""Teachers: they score every token of the rollouts.

`megatron` is the colocated, forward-only Megatron teacher. A teacher may import models, parallel and data; nothing of
training or rollout.
"""
