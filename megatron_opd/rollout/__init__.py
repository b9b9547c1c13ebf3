"""Rollouts: the student draws responses to prompts.

- `sampling`: how a token is drawn from logits, and the noise it is drawn with.
- `local`: `LocalEngine`, which generates on the training ranks with the model's own weights.
- `decoder`, `feed_forward`, `kv_cache`, `projection`: the forward pass of one pipeline stage, with cached keys and
  values.
- `sglang`: `SGLangEngine`, which has SGLang servers draw; `replicas` is its way to them.
- `servers`: starts SGLang servers and keeps them running; `server_start`: with which command, environment and port;
  `guard` ends them with the trainer.
- `cut_off`: responses that a change of weights has cut off.
- `event_loop`: the thread in which responses of servers are waited for.
- `stream`: the rollouts of step after step, some of them drawn ahead.
- `sharded`: what an engine is, and how the replicas (data x context parallel) each generate a share.

May import models, parallel, data and `objectives.kept_ids`; never training, teacher or checkpoint.
"""
