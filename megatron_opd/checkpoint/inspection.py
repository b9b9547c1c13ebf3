"""What a model folder holds, as text, from config.json, headers and metadata.

Numbers are read in two cases: when the checksums of a Megatron folder are to be compared, and when a Hugging Face
folder stores the LM head beside the embedding that it is tied to, which have to be equal.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_opd.checkpoint.checksums import StateChecksums
from megatron_opd.checkpoint.hf_import import HfReader
from megatron_opd.checkpoint.pieces import Plan, dtype_name
from megatron_opd.checkpoint.safetensors_files import DTYPES
from megatron_opd.checkpoint.shared_count import Progress, SharedCount
from megatron_opd.checkpoint.state_read import StateReader, StoredTensor
from megatron_opd.checkpoint.verify import checked_plan
from megatron_opd.checkpoint.weights import STATE, TEACHER_PREFIX
from megatron_opd.data.tokenizer import ROLES, load_tokenizer
from megatron_opd.models.architecture import Architecture

Rows = list[tuple[str, ...]]


def describe_folder(
    folder: Path, *, tensors: bool = False, check: bool = False, progress: Progress | None = None
) -> str:
    """A report on a Hugging Face or Megatron folder; with `tensors` every tensor in it, the optimizer's too.

    With `check` the files of a Megatron folder are read and compared with their checksums; `progress(done, total)` is
    called with bytes. Raises UserError for whatever a conversion of the folder would refuse.
    """
    plan = checked_plan(folder)
    megatron = isinstance(plan.reader, StateReader)
    stored = plan.reader.tensors if isinstance(plan.reader, StateReader) else _hf_tensors(plan, plan.reader)
    keys = {piece.key for piece in plan.pieces} if megatron else stored.keys()
    model = {name: tensor for name, tensor in stored.items() if name in keys}
    beside = {name: tensor for name, tensor in stored.items() if name not in keys}
    kind = f"Megatron folder ({STATE}/, loads at any layout)" if megatron else "Hugging Face folder"
    rows: Rows = [("folder", str(folder)), ("kind", kind), *_architecture_rows(plan.arch)]
    rows += _parameter_rows(plan)
    rows.append(("weights", _summary(model.values())))
    if megatron:
        teacher = {name: beside.pop(name) for name in list(beside) if name.startswith(TEACHER_PREFIX)}
        rows.append(("optimizer", _summary(beside.values()) if beside else "none"))
        rows += [("teacher", _summary(teacher.values()))] if teacher else []
    rows += _file_rows(folder)
    if megatron:
        rows.append(("checksums", _checksums(folder, check, progress)))
    rows.append(("tokenizer", _tokenizer(folder)))
    report = _aligned(rows)
    if not tensors and not megatron:
        return report
    shown = stored if tensors else model  # a Megatron folder has few keys: layers and experts are stacked
    return f"{report}\n\n{_aligned(_tensor_rows(shown))}"


def _hf_tensors(plan: Plan, reader: HfReader) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(shape, DTYPES[reader.dtype(name)])
        for piece in plan.pieces
        for name, shape in piece.hf.items()
    }


def _architecture_rows(arch: Architecture) -> Rows:
    heads = f"{arch.num_heads} heads of {arch.head_dim}, {arch.num_kv_groups} key/value groups"
    ffn = f"FFN {arch.ffn_size:,}, " if arch.moe is None else ""
    details = [
        "tied embeddings" if arch.tied_embeddings else "untied embeddings",
        "QKV bias" if arch.qkv_bias else "no QKV bias",
        "QK norm" if arch.qk_norm else "no QK norm",
    ]
    numbers = "".join(f", {name} {value:g}" for name, value in arch.rope.numbers.items())
    rows: Rows = [
        ("family", arch.family),
        ("sizes", f"{arch.num_layers} layers, hidden {arch.hidden_size:,}, {ffn}{heads}"),
        ("vocabulary", f"{arch.vocab_size:,} tokens, {arch.max_positions:,} positions"),
        ("details", ", ".join(details)),
        ("RoPE", f"{arch.rope.kind}, theta {arch.rope.theta:,g}{numbers}"),
    ]
    if arch.moe is not None:
        moe = arch.moe
        experts = f"{moe.num_experts} of FFN {moe.expert_ffn_size:,} in every layer, {moe.experts_per_token} a token"
        rows.insert(2, ("experts", experts))
    return rows


def _parameter_rows(plan: Plan) -> Rows:
    """All parameters (tied embeddings once), and those that one token goes through."""
    total, active = plan.arch.parameter_count(), plan.arch.parameter_count(active=True)
    used = f", of which a token uses {active:,}" if plan.arch.moe else ""
    return [("parameters", f"{total:,}{used}")]


def _summary(tensors: Iterable[StoredTensor]) -> str:
    """Number, dtypes and bytes."""
    sizes: Counter[torch.dtype] = Counter()
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        counts[tensor.dtype] += 1
        sizes[tensor.dtype] += _nbytes(tensor)
    return ", ".join(
        f"{counts[dtype]} tensors in {dtype_name(dtype)} ({_size(sizes[dtype])})" for dtype in sizes
    )


def _file_rows(folder: Path) -> Rows:
    """Number and bytes of the weight files, and each by name while they are few."""
    files = sorted(folder.glob("*.safetensors")) or sorted((folder / STATE).glob("*.distcp"))
    sizes = [file.stat().st_size for file in files]
    total = f"{len(files)}, {_size(sum(sizes))}"
    if len(files) > 4:
        return [("files", f"{total}: {files[0].name} ... {files[-1].name}")]
    named = ", ".join(
        f"{file.relative_to(folder)} {size:,} bytes" for file, size in zip(files, sizes, strict=True)
    )
    return [("files", f"{total}: {named}")]


def _checksums(folder: Path, check: bool, progress: Progress | None) -> str:
    recorded = StateChecksums(folder / STATE)
    if not recorded.files:
        return "none, the folder is of an older version: damaged numbers are not noticed"
    if not check:
        return f"of {recorded.files} files, not compared (--check compares them)"
    count = SharedCount(recorded.nbytes, None, progress)
    recorded.check(count=count.add)
    count.finish()
    return f"of {recorded.files} files, all right"


def _tokenizer(folder: Path) -> str:
    if not any(folder.glob("tokenizer*")):
        return "none"
    tokenizer = load_tokenizer(folder)
    roles = []
    for role in ROLES:
        index = getattr(tokenizer, role)
        if index is not None:
            roles.append(
                f"{role.removesuffix('_token_id')} {index} {tokenizer.convert_ids_to_tokens(index)!r}"
            )
    template = "chat template" if tokenizer.chat_template else "no chat template"
    return ", ".join([f"{len(tokenizer):,} tokens", *roles, template])


def _tensor_rows(tensors: dict[str, StoredTensor]) -> Rows:
    rows: Rows = [("tensor", "shape", "dtype", "bytes")]
    for name, tensor in tensors.items():
        rows.append((name, str(list(tensor.shape)), dtype_name(tensor.dtype), f"{_nbytes(tensor):,}"))
    return rows


def _aligned(rows: Rows) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _nbytes(tensor: StoredTensor) -> int:
    return tensor.dtype.itemsize * torch.Size(tensor.shape).numel()


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
