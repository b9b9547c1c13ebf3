"""Starting runs and looking at the machine they start on.

- `local`: starts and watches the processes of one machine.
- `worker`: what a started process owes the one that started it.
- `allreduce`: a worker that checks that the processes reach each other.
- `doctor`: what this machine has, and whether it can train.

Imports torch, `errors` and, for the version of megatron-core that was checked, `parallel.cpu`; never `config`, the
models or the training step.
"""
