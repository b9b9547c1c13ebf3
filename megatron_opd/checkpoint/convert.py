"""Hugging Face folder -> Megatron folder and back, piece by piece: no model is built, none is ever in memory.

Both directions make a plan first, which reads headers only and finds every mistake in the source that can be found
without the numbers, then move one piece after the other. Several processes share the pieces by bytes.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from megatron_opd.checkpoint.folders import alike, aside_of, written_together
from megatron_opd.checkpoint.hf_families import shard_from_hf
from megatron_opd.checkpoint.hf_import import HfReader, check_hf_weights
from megatron_opd.checkpoint.pieces import Piece, Plan, empty_objects, model_pieces
from megatron_opd.checkpoint.safetensors_files import DTYPES, SafetensorsFiles, TensorSpec
from megatron_opd.checkpoint.state_read import StateReader, StoredTensor
from megatron_opd.checkpoint.state_write import Block, start_state, write_state
from megatron_opd.checkpoint.weights import (
    STATE,
    copy_model_files,
    copy_tokenizer_files,
    is_megatron_folder,
    write_config,
)
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import read_architecture

DtypeChoice = Literal["keep", "bf16", "fp32"]
Progress = Callable[[int, int], object]
"""`progress(done, total)`: bytes of this process's share."""

_CHOSEN = {"bf16": torch.bfloat16, "fp32": torch.float32}
_MODEL_PARTS = ("embedding.", "decoder.", "output_layer.")


def hf_to_megatron(
    source: Path,
    target: Path,
    *,
    dtype: DtypeChoice = "keep",
    group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the Hugging Face folder `source` as a Megatron folder `target`, which loads at any layout.

    The weights keep their dtype unless `dtype` says otherwise. Each process holds the largest tensor once, or in both
    dtypes where it changes, and 64 MiB.

    Raises UserError, with nothing left behind, for anything wrong with `source`, and when `target` exists, does not
    fit on the disk or cannot be written. Collective over `group` (None: this process alone): `written_together` and
    `write_state`.
    """
    plan = plan_hf_to_megatron(source, dtype)
    mine = plan.share(group)
    count = _counted(progress, sum(plan.sizes[index] for index in mine))
    reader = plan.reader
    assert isinstance(reader, HfReader)

    def make(index: int) -> torch.Tensor:
        piece, piece_dtype = plan.pieces[mine[index]], plan.dtypes[mine[index]]
        whole = {"tp_rank": 0, "tp_size": 1, "padded_vocab_size": plan.arch.padded_vocab_size(1)}
        tensor = shard_from_hf(piece.weight, plan.arch, reader.read, **whole).to(piece_dtype)
        count(tensor.nbytes)
        return tensor.view(piece.sizes)

    with written_together(target, group, sum(plan.sizes)) as aside:
        first = group is None or group.rank() == 0
        with alike(group):
            if first:
                copy_model_files(source, aside)
                if dtype != "keep":
                    write_config(source, aside, _CHOSEN[dtype])
                start_state(aside / STATE)
        blocks = [_block(plan.pieces[index], plan.dtypes[index]) for index in mine]
        write_state(aside / STATE, blocks, empty_objects(plan.arch) if first else [], make, group)


def megatron_to_hf(
    source: Path,
    target: Path,
    *,
    dtype: DtypeChoice = "keep",
    group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a Megatron folder (a converted model or a checkpoint of a run) as a Hugging Face folder `target`.

    The weights keep the dtype they have in `source` unless `dtype` says otherwise. Each process holds the largest
    tensor once, or the fused query-key-value parameter of a layer twice, and 64 MiB.

    Raises UserError, with nothing left behind, for anything wrong with `source`, and when `target` exists, does not
    fit on the disk or cannot be written. Collective over `group` (None: this process alone): `written_together` and 1
    object all-gather.
    """
    plan = plan_megatron_to_hf(source, dtype)
    mine = plan.share(group)
    count = _counted(progress, sum(plan.sizes[index] for index in mine))
    specs = [
        TensorSpec(name, shape, piece_dtype)
        for piece, piece_dtype in zip(plan.pieces, plan.dtypes, strict=True)
        for name, shape in piece.hf.items()
    ]
    files = SafetensorsFiles(aside_of(target), specs)
    with written_together(target, group, files.nbytes) as aside:
        with alike(group):
            if group is None or group.rank() == 0:
                write_config(source, aside, plan.dtypes[0])
                copy_tokenizer_files(source, aside)
                files.create()
        for index in mine:
            piece = plan.pieces[index]
            for name, tensor in zip(piece.hf, plan.read(piece), strict=True):
                files.write(name, tensor)
            count(plan.sizes[index])


def plan_hf_to_megatron(source: Path, dtype: DtypeChoice = "keep") -> Plan:
    """Check the Hugging Face folder `source`, headers only, and say what a conversion of it moves.

    Raises UserError for the first mistake in it.
    """
    arch = read_architecture(source)
    if is_megatron_folder(source):
        raise UserError(f"{source} is a Megatron folder already")
    reader = HfReader(source)
    check_hf_weights(reader, arch)
    pieces = model_pieces(arch)
    kept: dict[str, torch.dtype] = {}  # a stored tensor, with all its layers, has one dtype
    for piece in pieces:
        for name in piece.hf:
            found = DTYPES[reader.dtype(name)]
            kept[piece.key] = torch.promote_types(kept.get(piece.key, found), found)
    return Plan(source, reader, arch, pieces, [_CHOSEN.get(dtype, kept[piece.key]) for piece in pieces])


def plan_megatron_to_hf(source: Path, dtype: DtypeChoice = "keep") -> Plan:
    """Check the Megatron folder `source`, metadata and file sizes only, and say what a conversion of it moves.

    Raises UserError for the first mistake in it.
    """
    arch = read_architecture(source)
    if not is_megatron_folder(source):
        raise UserError(f"{source} is not a Megatron folder: it has no {STATE}/")
    reader = StateReader(source / STATE)
    found = reader.tensors
    pieces = model_pieces(arch)
    for piece in pieces:
        _check_stored(piece, found.get(piece.key), source / STATE)
    keys = {piece.key for piece in pieces}
    for key in sorted(found.keys() - keys):
        if key.startswith(_MODEL_PARTS):
            raise UserError(f"{source / STATE}: unexpected tensor {key}, not part of this architecture")
    reader.check_files(sorted(keys))
    return Plan(
        source, reader, arch, pieces, [_CHOSEN.get(dtype, found[piece.key].dtype) for piece in pieces]
    )


@contextmanager
def launched_group() -> Iterator[dist.ProcessGroup | None]:
    """The group of all processes that a launcher started with this one (RANK, WORLD_SIZE, ...), None when alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # it reaches every process, and whoever started them tidies up
    dist.init_process_group("gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _block(piece: Piece, dtype: torch.dtype) -> Block:
    return Block(piece.key, piece.global_shape, dtype, piece.offsets, piece.sizes)


def _check_stored(piece: Piece, found: StoredTensor | None, state: Path) -> None:
    if found is None:
        raise UserError(f"{state} lacks the tensor {piece.key} that config.json calls for")
    shape, implied = found.shape, piece.global_shape
    padded = piece.weight.layout == "vocab" and shape[1:] == implied[1:] and shape[0] >= piece.real_sizes[0]
    if shape != implied and not padded:
        raise UserError(f"{state}: {piece.key} has shape {list(shape)}, config.json implies {list(implied)}")
    if found.dtype not in DTYPES.values():
        name = str(found.dtype).removeprefix("torch.")
        raise UserError(f"{state}: {piece.key} is stored as {name}, not in fp32, bf16 or fp16")


def _counted(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    return count
