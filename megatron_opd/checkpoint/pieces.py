"""A whole model as the pieces that a conversion moves one by one: what is stored where, on either side.

A piece is the smallest thing that can be moved alone: one parameter, or for the fused gate-and-up projection one of
its two halves. megatron-core stacks the layers (and a layer's experts) of a parameter along leading dimensions of one
stored tensor; a piece is a block of it.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.checkpoint.hf_families import hf_from_shards, model_weights, stored_at
from megatron_opd.checkpoint.hf_import import HfReader
from megatron_opd.checkpoint.safetensors_files import TensorSpec
from megatron_opd.checkpoint.state_read import StateReader
from megatron_opd.models.architecture import Architecture
from megatron_opd.models.families.rows import Weight

_LINEAR = re.compile(r"linear_(qkv|proj|fc1|fc2)\.weight")


@dataclass(frozen=True)
class Piece:
    """A block of the stored tensor `key` and the Hugging Face tensors that it is made of (name -> shape).

    `weight` is the piece's row of the family's table; its layout is never `gate_up`. Block and stored tensor have the
    `stacked` leading dimensions that the layers and experts are stacked along.
    """

    weight: Weight
    hf: dict[str, tuple[int, ...]]
    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    stacked: int

    @property
    def name(self) -> str:
        """The parameter's name, and which of its rows this is when it is not all of them."""
        first, rows = self.offsets[self.stacked], self.own_sizes[0]
        whole = rows == self.global_shape[self.stacked]
        return self.weight.megatron if whole else f"{self.weight.megatron}[{first}:{first + rows}]"

    @property
    def own_sizes(self) -> tuple[int, ...]:
        """The block's shape without the leading dimensions."""
        return self.sizes[self.stacked :]

    @property
    def real_sizes(self) -> tuple[int, ...]:
        """The block's shape without the padding of the vocabulary."""
        if self.weight.layout != "vocab":
            return self.sizes
        (shape,) = self.hf.values()
        return shape


@dataclass(frozen=True)
class Plan:
    """What a conversion moves: the checked source folder, the pieces, and the dtype each is written in.

    `mixed` says what dtypes the source has for a stored tensor that gets one dtype because it holds all layers.
    """

    source: Path
    reader: HfReader | StateReader  # of the source, open since the check
    arch: Architecture
    pieces: Sequence[Piece]
    dtypes: Sequence[torch.dtype]
    mixed: Mapping[str, Collection[torch.dtype]] = field(default_factory=dict)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shape of each piece as it is written: the vocabulary is padded in a Megatron folder only."""
        padded = isinstance(self.reader, HfReader)
        return [piece.sizes if padded else piece.real_sizes for piece in self.pieces]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each piece as it is written."""
        return [
            dtype.itemsize * torch.Size(shape).numel()
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]

    @property
    def specs(self) -> list[TensorSpec]:
        """The Hugging Face tensors of all pieces."""
        return [
            TensorSpec(name, shape, dtype)
            for piece, dtype in zip(self.pieces, self.dtypes, strict=True)
            for name, shape in piece.hf.items()
        ]

    @property
    def note(self) -> str | None:
        """One line on the tensors whose layers have different dtypes in the source; None where there are none."""
        if not self.mixed:
            return None
        dtypes = {piece.key: dtype for piece, dtype in zip(self.pieces, self.dtypes, strict=True)}
        changes = [
            f"{key} ({', '.join(sorted(map(dtype_name, found)))} -> {dtype_name(dtypes[key])})"
            for key, found in self.mixed.items()
        ]
        return (
            "note: a stored tensor holds all its layers in one dtype, here the one that changes no number: "
            + ", ".join(changes)
        )

    def share(self, group: dist.ProcessGroup | None) -> list[int]:
        """Indices of the pieces that this process of the group moves (None: all of them)."""
        everything = shares(self.sizes, 1 if group is None else group.size())
        return everything[0 if group is None else group.rank()]

    def read(self, piece: Piece) -> list[Tensor]:
        """The piece's Hugging Face tensors, in the order of `piece.hf`, from a source of either kind."""
        if isinstance(self.reader, HfReader):
            return [self.reader.read(name, 0, 0, shape[0]) for name, shape in piece.hf.items()]
        block = self.reader.read(piece.key, piece.offsets, piece.real_sizes)
        return hf_from_shards(piece.weight, self.arch, [block.flatten(0, piece.stacked)])

    def describe(self) -> str:
        """The plan as text: a line a piece (megatron's name, shape, dtype, bytes, Hugging Face names), note, total."""
        rows = [
            (
                piece.name,
                str(list(shape[piece.stacked :])),
                dtype_name(dtype),
                f"{size:,}",
                " + ".join(piece.hf),
            )
            for piece, shape, dtype, size in zip(
                self.pieces, self.shapes, self.dtypes, self.sizes, strict=True
            )
        ]
        rows.insert(0, ("megatron", "shape", "dtype", "bytes", "Hugging Face"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                (
                    *(text.ljust(w) for text, w in zip(row[:3], widths, strict=False)),
                    row[3].rjust(widths[3]),
                    row[4],
                )
            )
            for row in rows
        ]
        tensors = sum(len(piece.hf) for piece in self.pieces)
        if self.note:
            lines.append(self.note)
        return "\n".join([*lines, f"total: {tensors:,} Hugging Face tensors, {sum(self.sizes):,} bytes"])


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as config.json spells it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def shares(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Indices of `sizes` dealt out to `count` processes so that their sums are about equal; each list in order."""
    dealt: list[list[int]] = [[] for _ in range(count)]
    sums = [0] * count
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        least = sums.index(min(sums))
        dealt[least].append(index)
        sums[least] += sizes[index]
    return [sorted(indices) for indices in dealt]


def model_pieces(arch: Architecture) -> list[Piece]:
    """Every piece of the model, embedding first, then layer by layer; tied embeddings come once.

    The vocabulary is padded as for one tensor-parallel rank.
    """
    pieces: list[Piece] = []
    seen: set[str] = set()
    for weight in model_weights(arch):
        shapes = weight.shapes(arch.dimensions)
        if not seen.issuperset(shapes):  # all but the tied LM head
            seen.update(shapes)
            pieces.extend(_pieces_of(weight, arch))
    return pieces


def empty_objects(arch: Architecture) -> list[str]:
    """Keys of the (empty) extra state that megatron-core stores for every parallel linear layer of a decoder layer."""
    keys = []
    for weight in model_weights(arch):
        if weight.layer is not None and _LINEAR.search(weight.megatron):
            key, axes = stored_at(weight, arch)
            offsets, counts = (".".join(str(axis[n]) for axis in axes) for n in (1, 2))
            keys.append(f"{key.removesuffix('weight')}_extra_state/shard_{offsets}_{counts}")
    return keys


def _pieces_of(weight: Weight, arch: Architecture) -> Iterator[Piece]:
    key, axes = stored_at(weight, arch)
    counts, numbers = tuple(axis[2] for axis in axes), tuple(axis[1] for axis in axes)
    parts = [weight]
    if weight.layout == "gate_up":
        parts = [replace(weight, layout="direct", hf=(tensor,)) for tensor in weight.hf]
    sizes = [_size(part, arch) for part in parts]
    own_shape = (sum(size[0] for size in sizes), *sizes[0][1:])
    row = 0
    for part, size in zip(parts, sizes, strict=True):
        yield Piece(
            weight=part,
            hf=part.shapes(arch.dimensions),
            key=key,
            global_shape=counts + own_shape,
            offsets=(*numbers, row, *(0 for _ in own_shape[1:])),
            sizes=(1,) * len(axes) + size,
            stacked=len(axes),
        )
        row += size[0]


def _size(weight: Weight, arch: Architecture) -> tuple[int, ...]:
    shapes = list(weight.shapes(arch.dimensions).values())
    rows = arch.padded_vocab_size(1) if weight.layout == "vocab" else sum(shape[0] for shape in shapes)
    return (rows, *shapes[0][1:])
