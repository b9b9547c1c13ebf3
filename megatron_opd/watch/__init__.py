"""How a run ends otherwise than by its last step: asked to stop, or stuck.

- `stopping`: signals to any rank, agreed on by all at the end of a step.
- `phases`: which part of a step this rank is in, and how long each took.
- `watchdog`: a limit on each phase; stacks and a line about a rank that is stuck or gone.

Imports torch and `launch.worker`; never `config`, the models or the training step.
"""
