"""The student's weights on their way to the servers that draw its rollouts.

- `sync`: what all transports share: start, connection, attempts, version, restart, checksums.
- `transport`: what a transport is given and has to do.
- `disk`, `tensor`, `distributed`: through a folder, through HTTP, through a torch process group.
- `buckets`: what the last two have in common.
- `checksums`: whether the servers have what was sent.

May import checkpoint and rollout; never training or teacher.
"""
