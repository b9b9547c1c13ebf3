"""Process groups of the student and of the teacher, and what megatron-core needs to run without CUDA.

- `groups`: parallel layout -> `ProcessGroupCollection`, passed explicitly everywhere.
- `cpu`: makes megatron-core run on CPU tensors and gloo; does nothing where CUDA exists.
- `torch_adam`: lets megatron-core's DistributedOptimizer resume when its Adam is torch's.

Nothing here may import models, data or anything above them.
"""
