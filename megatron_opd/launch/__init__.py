"""Starting runs and looking at the machine they start on.

- `local`: starts and watches the processes of one machine.
- `worker`: what a started process owes the one that started it.
- `doctor`: what this machine has, and whether it can train.

Imports torch's launcher, `config` and `errors`; never the models or the training step.
"""
