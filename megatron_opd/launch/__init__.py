"""Starting runs and looking at the machine they start on.

- `local`: starts and watches the processes of one machine.
- `worker`: what a started process owes the one that started it.
- `check`: a line of `doctor`'s report.
- `connections`: whether ranks reach each other, and how fast.
- `started`: ranks that something else has started meet.
- `surroundings`: disk, servers and layout of a configuration.
- `doctor`: what machines have, and whether they can train.

What starts processes imports torch and `errors` only; `doctor` and `surroundings` read a configuration, and ask the
checks of `preflight`, `rollout` and `teacher`. Nothing here imports the training step.
"""
