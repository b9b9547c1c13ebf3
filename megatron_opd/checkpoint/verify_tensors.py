"""Do two model folders hold the same numbers? Every Hugging Face tensor of both, compared bit for bit.

Tensors of a Megatron folder are put together as an export would; no model is built, and one tensor at a time is held.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_opd.checkpoint.checksums import StateChecksums
from megatron_opd.checkpoint.pieces import Plan, dtype_name
from megatron_opd.checkpoint.shared_count import Progress, SharedCount
from megatron_opd.checkpoint.state_read import StateReader
from megatron_opd.checkpoint.verify import checked_plan
from megatron_opd.checkpoint.weights import STATE
from megatron_opd.errors import UserError

_BITS = {4: torch.int32, 2: torch.int16}


@dataclass(frozen=True)
class TensorComparison:
    """How many tensors were compared, of how many bytes in the first folder, and a line for each that differs."""

    tensors: int
    nbytes: int
    differences: list[str]

    @property
    def passed(self) -> bool:
        """Whether all are identical."""
        return not self.differences


def verify_tensors(first: Path, second: Path, progress: Progress | None = None) -> TensorComparison:
    """Compare every tensor of two folders of either kind; equal numbers in different dtypes count as different.

    The files of a Megatron folder are compared with their checksums first. `progress(done, total)` is called with
    bytes, those read for that included. Raises UserError for a broken folder, and for models of different shapes.
    """
    a, b = checked_plan(first), checked_plan(second)
    _check_same_shapes(a, b)
    recorded = [
        StateChecksums(plan.source / STATE) for plan in (a, b) if isinstance(plan.reader, StateReader)
    ]
    total = sum(spec.nbytes for spec in a.specs) + sum(checksums.nbytes for checksums in recorded)
    count = SharedCount(total, None, progress)
    for checksums in recorded:
        checksums.check(count=count.add)
    differences: list[str] = []
    nbytes = tensors = 0
    for piece in a.pieces:
        for name, mine, theirs in zip(piece.hf, a.read(piece), b.read(piece), strict=True):
            tensors += 1
            nbytes += mine.nbytes
            count.add(mine.nbytes)
            difference = _difference(mine, theirs)
            if difference:
                differences.append(f"{name}: {difference}")
    count.finish()
    return TensorComparison(tensors, nbytes, differences)


def _difference(a: Tensor, b: Tensor) -> str:
    """Nothing when the tensors have the same dtype and bits."""
    if a.dtype != b.dtype:
        names = [dtype_name(dtype) for dtype in (a.dtype, b.dtype)]
        same = " (equal numbers)" if torch.equal(a.float(), b.float()) else ""
        return f"{names[0]} and {names[1]}{same}"
    bits = _BITS[a.itemsize]
    a_bits, b_bits = a.contiguous().view(bits), b.contiguous().view(bits)
    if torch.equal(a_bits, b_bits):
        return ""
    differing = int((a_bits != b_bits).sum())
    largest = float((a.float() - b.float()).abs().max())
    return f"{differing} of {a.numel()} numbers differ, by at most {largest:.3g}"


def _check_same_shapes(a: Plan, b: Plan) -> None:
    mine, theirs = (
        {name: shape for piece in plan.pieces for name, shape in piece.hf.items()} for plan in (a, b)
    )
    for name in [*mine, *theirs]:
        if mine.get(name) != theirs.get(name):
            had = [f"{list(shapes[name])}" if name in shapes else "none" for shapes in (mine, theirs)]
            raise UserError(
                f"{a.source} and {b.source} are models of different shapes: {name} is {had[0]} there, {had[1]} here"
            )
