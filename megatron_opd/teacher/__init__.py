"""Teachers: they score every token of the rollouts.

- `megatron`: the colocated, forward-only Megatron teacher; `host_weights`: where its weights wait for their next use.
- `relaid`, `separate`: the Megatron teacher in a layout of its own, on the student's ranks and on others; `transport`:
  which rank sends which rows of a payload to which; `window`: how many are on their way at once; `orders`: what the
  ranks of a separate teacher are told.
- `sglang`: the teacher behind SGLang servers; `score_requests`: what they are asked, and what their replies say;
  `contract`: whether they serve the model that they should.
- `dealing`: payloads of a teacher with prompts of its own, under context parallelism.
- `several`: several of those on the student's ranks, one for each microbatch or all mixed.
- `cached`: any of them behind a `cache`, files of what it has said of whole sequences; `cache_report`: these as text.
- `teacher`: what all kinds are to the training loop; `payload`: what they hand to the objective; `projection`: how a
  Megatron teacher's is made of hidden states, and read.

A teacher may import of config the `schema`, models, parallel, data and objectives, of rollout the way to SGLang servers
(`client`, `replicas`) and of checkpoint `folders`; nothing of training.
"""
