"""Teachers: they score every token of the rollouts.

`megatron` is the colocated, forward-only Megatron teacher, `host_weights` where its weights wait for their next use. A
teacher may import models, parallel and data; nothing of training or rollout.
"""
