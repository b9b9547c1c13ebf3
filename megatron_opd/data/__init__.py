"""What flows through the loop: prompts, rollouts and packed microbatches.

Holds the plain data classes that the parts of the loop exchange and the code that makes them. May import
`config`, `errors` and, of objectives, `context_parallel` (which rank holds which tokens) and `kept_ids`; never the
rollout engine, the models or the training step.
"""
