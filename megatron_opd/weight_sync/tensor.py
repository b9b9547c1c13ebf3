"""Weights through HTTP, as pickled tensors: for servers on the trainer's machine, without a file system between.

The tensors travel by value, through host memory, whether trainer and servers run on CPUs or GPUs. SGLang also takes
handles of GPU memory (CUDA IPC), which would move nothing on a GPU that both use; that is not done here.
"""

import base64
import pickle
from collections.abc import Sequence

from torch import Tensor

from megatron_opd.rollout.replicas import BadReply
from megatron_opd.weight_sync.buckets import send_buckets
from megatron_opd.weight_sync.transport import Ask, Bucket, Outgoing, Trouble, shards_of, troubles_of


class TensorTransport:
    """Posts the buckets to /update_weights_from_tensor."""

    def send(self, weights: Outgoing, ask: Ask, urls: Sequence[str]) -> dict[str, Trouble]:
        """See `Transport`."""
        shards = shards_of(ask, urls) if urls else {}

        def give(bucket: Bucket, taking: Sequence[str]) -> dict[str, Trouble]:
            bodies = {count: _body(bucket, count) for count in set(shards.values())}
            path = "/update_weights_from_tensor"
            return troubles_of(ask(path, {url: bodies[shards[url]] for url in taking}))

        troubles = send_buckets(weights, ask, list(shards), give)
        silent = (url for url in urls if url not in shards)
        return troubles | dict.fromkeys(silent, BadReply("/server_info does not say tp_size"))


def _body(bucket: Bucket, copies: int) -> bytes:
    """The request, as JSON, with the tensors once for every process of the server that loads a shard of them."""
    values = [(name, _by_itself(tensor)) for name, tensor in bucket]
    text = base64.b64encode(pickle.dumps(values, protocol=4))  # what JSON need not escape
    return b'{"flush_cache":false,"serialized_named_tensors":["' + b'","'.join([text] * copies) + b'"]}'


def _by_itself(tensor: Tensor) -> Tensor:
    """On the CPU, in memory of its own: a pickled view brings all that it is a view of."""
    tensor = tensor.cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
