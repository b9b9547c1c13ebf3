"""The student's weights on their way to the servers that draw its rollouts.

- `disk`: through a Hugging Face folder that the trainer writes and the servers read.
- `checksums`: whether the servers have what was sent.

May import checkpoint and rollout; never training or teacher.
"""
