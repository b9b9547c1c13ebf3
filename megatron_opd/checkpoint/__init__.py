"""Weights on disk: Hugging Face folders, Megatron folders, and a run's own checkpoints.

- `hf_families`: the tables of `models.families` applied: Hugging Face tensors -> shards, and back.
- `hf_import`, `hf_export`: Hugging Face safetensors -> a model's shards, and back.
- `weights`: fill a model from either kind of folder; the config and tokenizer that go with it.
- `convert`: Hugging Face folder <-> Megatron folder, in `pieces` that are moved one by one.
- `state_read`, `state_write`: megatron-core's checkpoint format, tensor by tensor.
- `safetensors_files`: safetensors files, tensor by tensor.
- `checksums`: of a Megatron folder's files, recorded and compared.
- `fingerprint`: which weights a folder holds, by their checksums, which are remembered.
- `shared_count`: what the processes of a conversion have moved together.
- `store`: a run's checkpoints, saved and resumed; `writing`: their files, written while the training goes on;
  `published`: how they appear and go again, atomically.
- `folders`: how a new folder comes into being: written aside, then published.

Nothing here may import training, rollout, teacher or the loop.
"""
