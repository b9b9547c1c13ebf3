"""Hugging Face folder -> Megatron folder and back, piece by piece: no model is built, none is ever in memory.

Both directions make a plan first, from headers, which finds every mistake in the source that shows there, then move one
piece after the other. Several processes share the pieces by bytes.

A Megatron folder knows nothing of layouts: layers and experts have their numbers in the whole model and shards their
places in the whole tensor, so any tensor, pipeline (interleaved too) and expert parallelism writes and reads the same.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from megatron_opd.checkpoint.checksums import StateChecksums, write_checksums
from megatron_opd.checkpoint.folders import alike, aside_of, check_new_folder, written_together
from megatron_opd.checkpoint.hf_families import shard_from_hf
from megatron_opd.checkpoint.hf_import import HfReader, check_hf_weights
from megatron_opd.checkpoint.pieces import Piece, Plan, dtype_name, empty_objects, model_pieces
from megatron_opd.checkpoint.safetensors_files import DTYPES, SafetensorsFiles
from megatron_opd.checkpoint.shared_count import Progress, SharedCount
from megatron_opd.checkpoint.state_read import StateReader, StoredTensor
from megatron_opd.checkpoint.state_write import Block, start_state, write_state
from megatron_opd.checkpoint.weights import (
    STATE,
    copy_model_files,
    copy_tokenizer_files,
    is_megatron_folder,
    tokenizer_files,
    write_config,
)
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import read_architecture

DtypeChoice = Literal["keep", "bf16", "fp32"]
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
    fit on the disk or cannot be written. Collective over `group` (None: this process alone): `written_together`, 2
    object all-gathers and `write_state`.
    """
    plan = plan_hf_to_megatron(source, dtype)
    mine, first = plan.share(group), group is None or group.rank() == 0
    count = SharedCount(sum(plan.sizes), group, progress)

    def make(index: int) -> torch.Tensor:
        tensor = _stored(plan, mine[index])
        count.add(tensor.nbytes)
        return tensor

    with written_together(target, group, sum(plan.sizes)) as aside:
        with alike(group):
            if first:
                if plan.note:
                    print(plan.note, file=sys.stderr)
                copy_model_files(source, aside)
                if dtype != "keep":
                    write_config(source, aside, _CHOSEN[dtype])
                start_state(aside / STATE)
        blocks = [_block(plan.pieces[index], plan.dtypes[index]) for index in mine]
        objects = empty_objects(plan.arch) if first else []
        checksums = write_state(aside / STATE, blocks, objects, make, group)
        with alike(group):
            if first:
                write_checksums(aside, (aside / STATE).iterdir(), checksums)
    count.finish()


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
    tensor once, or the fused query-key-value parameter of a layer twice, and 64 MiB. First of all the files in `source`
    are compared with their checksums, which reads them once more; `progress` counts that too.

    Raises UserError, with nothing left behind, for anything wrong with `source`, and when `target` exists, does not
    fit on the disk or cannot be written. Collective over `group` (None: this process alone): `written_together` and 2
    object all-gathers.
    """
    plan = plan_megatron_to_hf(source, dtype)
    recorded = StateChecksums(source / STATE)
    count = SharedCount(recorded.nbytes + sum(plan.sizes), group, progress)
    files = SafetensorsFiles(aside_of(target), plan.specs)
    with written_together(target, group, files.nbytes) as aside:
        with alike(group):
            recorded.check(group, count.add)
        with alike(group):
            if group is None or group.rank() == 0:
                write_config(source, aside, plan.dtypes[0])
                copy_tokenizer_files(source, aside)
                files.create()
        for index in plan.share(group):
            piece = plan.pieces[index]
            for name, tensor in zip(piece.hf, plan.read(piece), strict=True):
                files.write(name, tensor)
            count.add(plan.sizes[index])
    count.finish()


def check_target(plan: Plan, target: Path) -> None:
    """Raise UserError when the planned conversion cannot write `target`: it exists, or the disk has no room for it."""
    to_hf = isinstance(plan.reader, StateReader)
    needed = SafetensorsFiles(aside_of(target), plan.specs).nbytes if to_hf else sum(plan.sizes)
    check_new_folder(target, needed)


def plan_hf_to_megatron(source: Path, dtype: DtypeChoice = "keep") -> Plan:
    """Check the Hugging Face folder `source` and say what a conversion of it moves.

    Reads headers only, unless the folder stores the LM head beside the embedding that it is tied to: those two are
    compared. Raises UserError for the first mistake in it.
    """
    arch = read_architecture(source)
    if is_megatron_folder(source):
        raise UserError(f"{source} is a Megatron folder already")
    reader = HfReader(source)
    check_hf_weights(reader, arch)
    tokenizer_files(source)
    pieces = model_pieces(arch)
    found: dict[str, set[torch.dtype]] = {}  # a stored tensor, with all its layers, has one dtype
    for piece in pieces:
        found.setdefault(piece.key, set()).update(DTYPES[reader.dtype(name)] for name in piece.hf)
    kept = {key: reduce(torch.promote_types, dtypes) for key, dtypes in found.items()}
    mixed = {key: dtypes for key, dtypes in found.items() if len(dtypes) > 1 and dtype == "keep"}
    return Plan(
        source, reader, arch, pieces, [_CHOSEN.get(dtype, kept[piece.key]) for piece in pieces], mixed
    )


def plan_megatron_to_hf(source: Path, dtype: DtypeChoice = "keep") -> Plan:
    """Check the Megatron folder `source`, metadata and file sizes only, and say what a conversion of it moves.

    Raises UserError for the first mistake in it.
    """
    arch = read_architecture(source)
    if not is_megatron_folder(source):
        raise UserError(f"{source} is not a Megatron folder: it has no {STATE}/")
    tokenizer_files(source)
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


def _stored(plan: Plan, index: int) -> torch.Tensor:
    """The numbers of a piece of a Hugging Face folder as the Megatron folder holds them."""
    assert isinstance(plan.reader, HfReader)
    piece, whole = plan.pieces[index], {"tp_rank": 0, "tp_size": 1}
    padded = plan.arch.padded_vocab_size(1)
    tensor = shard_from_hf(piece.weight, plan.arch, plan.reader.read, **whole, padded_vocab_size=padded)
    return tensor.to(plan.dtypes[index]).view(piece.sizes)


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
        raise UserError(
            f"{state}: {piece.key} is stored as {dtype_name(found.dtype)}, not in fp32, bf16 or fp16"
        )
