"""Run megatron-core on a machine without CUDA: CPU tensors, gloo process groups.

megatron-core 0.16.1 calls `torch.cuda` unconditionally and has the device's name in some functions. `install()`

1. gives `torch.cuda` the few functions megatron-core calls, for a device without streams (`_TORCH_CUDA`),
2. replaces the literals 'cuda' and 'torch.cuda.FloatTensor' in the functions of `_CUDA_LITERALS` by their CPU form,
3. points the RNG tracker at the CPU generator, makes `Tensor.cuda()` return the tensor itself, and has the exchange of
   tokens between experts read its counts where they are,
4. leaves out the distributed optimizer's collectives over one process, whose result lies in place: gloo would copy the
   whole buffers (0.4 s of a step with 112 million parameters),
5. has glibc keep freed memory, as the CUDA allocator does, instead of giving it back and faulting it in again.

It does nothing where CUDA exists, refuses a megatron-core it was not checked with, and raises when a listed function no
longer holds such a literal, so that an upgrade cannot leave an entry stale. No file of megatron-core is touched.
Nothing else in the package knows about any of this.
"""

import contextlib
import ctypes
import functools
import importlib
import logging
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_opd.errors import UserError

CHECKED_MEGATRON_CORE = ("0.16.1",)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h

_CUDA_LITERALS: dict[str, tuple[str, ...]] = {
    "megatron.core.utils": ("local_multi_tensor_l2_norm",),
    "megatron.core.transformer.utils": ("get_default_causal_mask",),
    "megatron.core.pipeline_parallel.schedules": (
        "forward_step",
        "forward_backward_no_pipelining",
        "forward_backward_pipelining_with_interleaving",
        "forward_backward_pipelining_without_interleaving",
    ),
    "megatron.core.optimizer.clip_grads": (
        "get_grad_norm_fp32",
        "clip_grad_by_total_norm_fp32",
        "count_zeros_fp32",
    ),
    "megatron.core.optimizer.optimizer": (
        "MixedPrecisionOptimizer.__init__",
        "Float16OptimizerWithFloat16Params.__init__",
        "FP32Optimizer.__init__",
    ),
    "megatron.core.optimizer.distrib_optimizer": (
        "DistributedOptimizer.__init__",
        "DistributedOptimizer._build_model_and_main_param_groups",
    ),
    "megatron.core.dist_checkpointing.exchange_utils": (
        "_get_empty_tensor_for_exchange",
        "exchange_loaded_tensors_gather_rounds",
    ),
    "megatron.core.dist_checkpointing.strategies.state_dict_saver": ("verify_global_md_reuse",),
}


class _Event:
    """`torch.cuda.Event` on a device whose work is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def record(self, stream: Any = None) -> None:
        del stream

    def wait(self, stream: Any = None) -> None:
        del stream

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None


class _Stream:
    """`torch.cuda.Stream` on a device that has none."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        del device, priority

    def wait_stream(self, stream: Any) -> None:
        del stream

    def synchronize(self) -> None:
        return None

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


def _get_rng_state(device: Any = None) -> torch.Tensor:
    del device
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
    del device, graph_safe
    torch.set_rng_state(new_state)


def _count_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """megatron-core's function converts only what it moves."""
    del record_stream
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _stream(device: Any = None) -> _Stream:
    del device
    return _Stream()


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The collective (output, input, *, group) where the group has several processes."""

    def call(output: torch.Tensor, source: torch.Tensor, *, group: dist.ProcessGroup, **options: Any) -> Any:
        if group.size() > 1:
            return collective(output, source, group=group, **options)
        assert output.data_ptr() == source.data_ptr() and output.numel() == source.numel()
        return None

    return call


_TORCH_CUDA: dict[str, Any] = {
    "current_device": lambda: "cpu",  # megatron-core only ever passes it on as device=...
    "set_device": lambda device: None,
    "synchronize": lambda device=None: None,
    "current_stream": _stream,
    "default_stream": _stream,
    "stream": contextlib.nullcontext,
    "Stream": _Stream,
    "Event": _Event,
    "manual_seed": torch.default_generator.manual_seed,
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
}

_originals: list[tuple[Any, str, Any]] = []


def _replace(owner: Any, name: str, value: Any) -> None:
    _originals.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def _to_cpu(constant: Any) -> Any:
    """The CPU form of one constant of a function's code: names, tuples of names, nested code objects."""
    if constant == "cuda":
        return "cpu"
    if isinstance(constant, str) and constant.startswith("torch.cuda.") and constant.endswith("Tensor"):
        return constant.replace("torch.cuda.", "torch.")
    if isinstance(constant, tuple):
        return tuple(_to_cpu(item) for item in constant)
    if isinstance(constant, types.CodeType):
        constants = tuple(_to_cpu(item) for item in constant.co_consts)
        return constant if constants == constant.co_consts else constant.replace(co_consts=constants)
    return constant


def _innermost_function(module: str, qualified_name: str) -> types.FunctionType:
    function = functools.reduce(getattr, qualified_name.split("."), importlib.import_module(module))
    function = getattr(function, "__func__", function)  # a classmethod's function
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    assert isinstance(function, types.FunctionType), f"{module}.{qualified_name} is no plain function"
    return function


def _check_version() -> None:
    from megatron.core import package_info

    if package_info.__version__ not in CHECKED_MEGATRON_CORE:
        raise UserError(
            f"megatron-core {package_info.__version__} was not checked on machines without CUDA: "
            f"install megatron-core=={CHECKED_MEGATRON_CORE[-1]}"
        )


def _keep_freed_memory() -> None:
    """Without it every large temporary costs its page faults again: about 15 % of a training step (glibc only)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def install() -> bool:
    """Make megatron-core run without CUDA; call it before building a model.

    Returns True when the adaptation is active, False where CUDA exists (nothing is done there). Calling it again is
    harmless. Raises UserError for a megatron-core version it was not checked with.
    """
    if _originals:
        return True
    if torch.cuda.is_available():
        return False
    _check_version()
    from megatron.core.distributed import param_and_grad_buffer as buffers
    from megatron.core.tensor_parallel import random as tensor_parallel_random
    from megatron.core.transformer.moe import token_dispatcher

    _keep_freed_memory()
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(
        logging.ERROR
    )  # "CPU RNG state changed"
    for name, stand_in in _TORCH_CUDA.items():
        _replace(torch.cuda, name, stand_in)
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(tensor_parallel_random, "_get_cuda_rng_state", lambda device=None, **kwargs: _get_rng_state())
    _replace(tensor_parallel_random, "_set_cuda_rng_state", _set_rng_state)
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        _replace(buffers, name, _unless_alone(getattr(buffers, name)))
    _replace(token_dispatcher, "maybe_move_tensor_to_cpu", _count_to_host)
    for module, qualified_names in _CUDA_LITERALS.items():
        for qualified_name in qualified_names:
            function = _innermost_function(module, qualified_name)
            code = _to_cpu(function.__code__)
            assert code is not function.__code__, (
                f"{module}.{qualified_name} holds no CUDA literal: drop it here"
            )
            _replace(function, "__code__", code)
    return True


def uninstall() -> None:
    """Undo `install()` (the tests check that nothing stays behind)."""
    while _originals:
        owner, name, value = _originals.pop()
        setattr(owner, name, value)
