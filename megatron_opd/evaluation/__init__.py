"""How well a model solves tasks that have right answers: `megatron-opd evaluate`, and evaluations during training.

- `answers`: the answer in a response, and whether two answers are plainly the same.
- `grading_process`, `grading`: a process that judges the others, and the way to it.
- `records`, `tasks`: problems from files and from reasoning-gym, as prompts.
- `scores`: avg@k, pass@k, maj@k and their intervals.
- `evaluate`: draw, grade, keep the samples.
- `standalone`: a model by itself, outside a training.

`answers` and `grading_process` import neither torch nor the rest of the package: a grading process starts quickly, and
runs at the mercy of what models write.
"""
