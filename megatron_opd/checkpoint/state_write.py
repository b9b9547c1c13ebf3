"""Writes the `state/` of a Megatron folder block by block, in the format of megatron-core's dist_checkpointing.

megatron-core's own writer wants a whole shard of the model in memory. Here torch's distributed checkpoint writes the
same files from a plan: each block is made when its turn comes, written and forgotten. Several processes share the
blocks by bytes.
"""

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_opd.checkpoint.checksums import HashedFile
from megatron_opd.errors import UserError


@dataclass(frozen=True)
class Block:
    """A part of a tensor that is written as one: the tensor's key, shape and dtype, and the part's place in it."""

    key: str
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return self.dtype.itemsize * torch.Size(self.sizes).numel()


def start_state(state: Path) -> None:
    """Make the folder of a checkpoint, with the files that say its format and that nothing but tensors is in it."""
    state.mkdir()
    torch.save({}, state / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(state))


def write_state(
    state: Path,
    blocks: Sequence[Block],
    empty_objects: Sequence[str],
    make: Callable[[int], Tensor],
    group: dist.ProcessGroup | None,
) -> dict[Path, str]:
    """Write the tensors of the checkpoint `state`, begun by `start_state`, from every rank's share of the blocks.

    `make(i)` returns the tensor of this rank's `blocks[i]`; it is asked once for each. `empty_objects` are this rank's
    share of the keys of small objects that megatron-core keeps beside the tensors of some layers, all None here.

    Returns the SHA-256 of every file of tensors, whichever rank has written it: taken on the way, nothing is read
    again. Collective over `group` (None: one process): the gathers and scatters of torch's distributed checkpoint,
    then 1 object all-gather. Raises on every rank what any of them raised.
    """
    writer = _BlockWriter(state)
    try:
        checkpoint.save(
            {},
            storage_writer=writer,
            planner=_LazyPlanner(blocks, empty_objects, make),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        raise _cause(error) from error
    everyones = [writer.checksums]
    if group is not None:
        everyones *= group.size()
        dist.all_gather_object(everyones, writer.checksums, group=group)
    return {path: found for checksums in everyones for path, found in checksums.items()}


class _LazyPlanner(SavePlanner):
    """Plans from a list of blocks and makes a block's tensor when the writer asks for it."""

    def __init__(
        self, blocks: Sequence[Block], empty_objects: Sequence[str], make: Callable[[int], Tensor]
    ) -> None:
        self._blocks = blocks
        self._empty_objects = empty_objects
        self._make = make
        self._index = {(block.key, block.offsets): index for index, block in enumerate(blocks)}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        items = [_tensor_item(block) for block in self._blocks]
        items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._empty_objects]
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Make what is written for this item, now."""
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save([None], stream)
            return stream
        offsets = write_item.index.offset
        assert offsets is not None
        index = self._index[write_item.index.fqn, tuple(offsets)]
        tensor, block = self._make(index), self._blocks[index]
        assert tensor.dtype == block.dtype and tensor.shape == block.sizes, f"{block}: made {tensor.shape}"
        return tensor.contiguous()


class _BlockWriter(checkpoint.FileSystemWriter):
    """torch's writer, which itself keeps the last tensor of every key until the file is complete."""

    def __init__(self, state: Path) -> None:
        super().__init__(state)
        self.checksums: dict[Path, str] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the plan's items to one file, one after the other."""
        name = f"{plan.storage_data.prefix}0.distcp"
        path, results = Path(self.path) / name, []
        with HashedFile(path) as file:
            for item in plan.items:
                start = file.tell()
                _append(file, planner.resolve_data(item))
                length = file.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
            file.flush()
            os.fsync(file.fileno())
        self.checksums[path] = file.checksum
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written


def _append(file: BinaryIO, data: Tensor | io.BytesIO) -> None:
    if isinstance(data, io.BytesIO):
        file.write(data.getbuffer())
        return
    if (
        data.untyped_storage().nbytes() != data.nbytes
    ):  # torch.save would write the whole file that it is a view of
        data = data.clone()
    try:
        torch.save(data, file)
    except RuntimeError as error:  # its zip writer's own complaint hides what went wrong: a full disk, Ctrl-C
        raise error.__context__ or error from None


def _tensor_item(block: Block) -> WriteItem:
    offsets, sizes = torch.Size(block.offsets), torch.Size(block.sizes)
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
        properties=TensorProperties(dtype=block.dtype),
        size=torch.Size(block.global_shape),
    )
    return WriteItem(MetadataIndex(block.key, offsets), WriteItemType.SHARD, tensor_data=data)


def _cause(error: CheckpointException) -> BaseException:
    """What went wrong on the first rank that failed; a mistake of the user comes before everything else."""
    causes = [error.failures[rank][0] for rank in sorted(error.failures)]
    return next((cause for cause in causes if isinstance(cause, UserError)), causes[0])
