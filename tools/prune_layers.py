"""Pruning: a smaller model made of parts of a Hugging Face folder, which it leaves as it is.

Depth, whole decoder layers:
    python -m tools.prune_layers SRC DST --keep 24 --from 8 --to 26          evenly spread over layers 8 to 25
    python -m tools.prune_layers SRC DST --drop 3,5,7                        these layers
    python -m tools.prune_layers SRC DST --keep 24 --by-influence TEXT       those that change a text least
Width, alone or with any of these (measured without the dropped layers):
    python -m tools.prune_layers SRC DST --ffn 1024 --by-activation TEXT     FFN channels
    python -m tools.prune_layers SRC DST --kv-groups 2 --by-activation TEXT  key/value groups, query heads included

TEXT is a JSONL file with a field `prompt` or `text`, or plain text, one sample a line. The first and the last
layers of a language model matter most, so evenly dropped ones should lie between. Copies the safetensors files
tensor by tensor, without building the model.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_opd.checkpoint.folders import aside_of, written_together
from megatron_opd.checkpoint.safetensors_files import DTYPES, FILE_BYTES, SafetensorsFiles, TensorSpec
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import read_architecture, read_config_json

if TYPE_CHECKING:
    from megatron_opd.checkpoint.hf_import import HfReader
    from tools.prune_importance import Importance

LAYER_PREFIX = "model.layers."
FFN, KV_GROUPS = "intermediate_size", "num_key_value_heads"
OPTION = {FFN: "ffn", KV_GROUPS: "kv_groups"}  # what it is called on the command line and in `Importance`
CUT = {  # matrix of a layer -> (what it consists of, along which dimension)
    "mlp.gate_proj": (FFN, 0),
    "mlp.up_proj": (FFN, 0),
    "mlp.down_proj": (FFN, 1),
    "self_attn.q_proj": (KV_GROUPS, 0),
    "self_attn.k_proj": (KV_GROUPS, 0),
    "self_attn.v_proj": (KV_GROUPS, 0),
    "self_attn.o_proj": (KV_GROUPS, 1),
}


@dataclass(frozen=True)
class Width:
    """Which FFN channels, or which key/value groups with their query heads, every layer keeps.

    `kept` holds the indices, ascending, for each layer that is not dropped (numbered as in the source), equally
    many in each.
    """

    kind: str  # FFN or KV_GROUPS
    kept: Mapping[int, Tensor]

    def __post_init__(self) -> None:
        assert len({len(indices) for indices in self.kept.values()}) == 1

    @property
    def size(self) -> int:
        """How many a layer keeps."""
        return len(next(iter(self.kept.values())))


def evenly_spaced(layers: int, keep: int, start: int, stop: int) -> list[int]:
    """The `layers - keep` layers to drop, ascending (0-based): evenly spaced over [start, stop).

    Raises UserError when there are not that many to drop.
    """
    drop = _number_to_drop(layers, keep, start, stop)
    return [start + i * (stop - start) // drop for i in range(drop)]


def least_influential(influence: Sequence[float], keep: int, start: int, stop: int) -> list[int]:
    """The layers to drop, ascending (0-based): those of [start, stop) with the least influence, `keep` stay.

    Raises UserError when there are not that many to drop.
    """
    drop = _number_to_drop(len(influence), keep, start, stop)
    return sorted(sorted(range(start, stop), key=lambda layer: influence[layer])[:drop])


def most_active(kind: str, scores: Mapping[int, Tensor], size: int) -> Width:
    """The `size` parts of each layer with the highest scores (layer -> [parts]); of equal ones the first."""
    kept = {
        layer: score.argsort(descending=True, stable=True)[:size].sort().values
        for layer, score in scores.items()
    }
    return Width(kind, kept)


def _number_to_drop(layers: int, keep: int, start: int, stop: int) -> int:
    drop = layers - keep
    if keep < 1 or drop < 1 or start < 0 or stop > layers or drop > stop - start:
        raise UserError(
            f"cannot keep {keep} of {layers} layers dropping only from layers {start} to {stop - 1}: "
            f"--keep must lie between {max(1, layers - max(stop - start, 0))} and {layers - 1}, --from and --to "
            f"between 0 and {layers}"
        )
    return drop


def prune(
    source: Path,
    destination: Path,
    dropped: Sequence[int],
    widths: Sequence[Width] = (),
    *,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Copy the HF folder without the decoder layers `dropped` (0-based), numbering the others anew, and with only
    the parts of the others that `widths` keep.

    Held in memory: the largest tensor and what is kept of it. Raises UserError for a source that is no complete HF
    folder of a supported model or lacks a layer that is to be dropped, and when the destination exists or cannot be
    written.
    """
    config = read_config(source)
    reader = _checked_reader(source)
    kept = kept_layers(source, config["num_hidden_layers"], dropped)
    parts = _parts(reader.names, kept, widths)
    specs = [
        TensorSpec(name, part.shape(reader, config), DTYPES[reader.dtype(part.name)])
        for name, part in parts.items()
    ]
    files = SafetensorsFiles(aside_of(destination), specs, file_bytes)
    with written_together(destination, None, files.nbytes) as aside:
        from megatron_opd.checkpoint.weights import copy_model_files

        files.create()
        for name, part in parts.items():
            files.write(name, part.read(reader, config))
        copy_model_files(source, aside)
        text = json.dumps(pruned_config(config, kept, widths), indent=2)
        (aside / "config.json").write_text(text + "\n", encoding="utf-8")


def kept_layers(source: Path, layers: int, dropped: Sequence[int]) -> list[int]:
    """The layers (0-based) that stay, ascending. Raises UserError when none does and for one that is not there."""
    if not set(dropped) <= set(range(layers)):
        raise UserError(
            f"{source}: has layers 0 to {layers - 1}; cannot drop {sorted(set(dropped) - set(range(layers)))}"
        )
    if len(set(dropped)) == layers:
        raise UserError(f"{source}: at least one of its {layers} layers must stay")
    return [layer for layer in range(layers) if layer not in set(dropped)]


def read_config(source: Path) -> dict:
    """config.json of a HF folder. Raises UserError when it is missing, broken or of an unsupported model."""
    read_architecture(source)
    return read_config_json(source)


def pruned_config(config: dict, kept: Sequence[int], widths: Sequence[Width] = ()) -> dict:
    """The configuration with the new number of layers and the new widths; settings listed per layer keep the
    entries of the kept ones."""
    layers = config["num_hidden_layers"]
    changed: dict[str, Any] = {
        key: [value[layer] for layer in kept]
        for key, value in config.items()
        if key == "layer_types" and isinstance(value, list) and len(value) == layers
    }
    changed["num_hidden_layers"] = len(kept)
    for width in widths:
        changed[width.kind] = width.size
        if width.kind == KV_GROUPS:
            heads = config["num_attention_heads"]
            changed["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
            changed["num_attention_heads"] = heads // number_of(KV_GROUPS, config) * width.size
    return config | changed


def number_of(kind: str, config: dict) -> int:
    """How many FFN channels or key/value groups a layer has; without the latter's key every head has its own."""
    return config.get(kind) or config["num_attention_heads"]


def _checked_reader(source: Path) -> "HfReader":
    """The weights, after a look at their headers: they are exactly the tensors that config.json calls for."""
    with warnings.catch_warnings():
        # megatron-core says on import which optional GPU packages it lacks.
        warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
        from megatron_opd.checkpoint.hf_import import HfReader, check_hf_weights
    reader = HfReader(source)
    check_hf_weights(reader, read_architecture(source))
    return reader


@dataclass(frozen=True)
class _Part:
    """What stays of a tensor of the source: all of it, or `kept` of what `kind` says it consists of along `dim`."""

    name: str
    kind: str = ""
    dim: int = 0
    kept: Tensor | None = None

    def shape(self, reader: "HfReader", config: dict) -> tuple[int, ...]:
        shape = list(reader.shape(self.name))
        if self.kept is not None:
            shape[self.dim] = shape[self.dim] // number_of(self.kind, config) * len(self.kept)
        return tuple(shape)

    def read(self, reader: "HfReader", config: dict) -> Tensor:
        tensor = reader.read(self.name, 0, 0, reader.shape(self.name)[0])
        if self.kept is None:
            return tensor
        parts = tensor.unflatten(self.dim, (number_of(self.kind, config), -1))
        return parts.index_select(self.dim, self.kept).flatten(self.dim, self.dim + 1)


def _parts(names: Iterable[str], kept: Sequence[int], widths: Sequence[Width]) -> dict[str, _Part]:
    """New name -> what stays, for every tensor that does; a layer's rotary frequencies, which old exports saved, go."""
    new_number = {old: new for new, old in enumerate(kept)}
    parts = {}
    for name in sorted(names):
        if not name.startswith(LAYER_PREFIX):
            parts[name] = _Part(name)
            continue
        number, rest = name.removeprefix(LAYER_PREFIX).split(".", 1)
        if int(number) not in new_number or rest.endswith("rotary_emb.inv_freq"):
            continue
        kind, dim = CUT.get(rest.rpartition(".")[0], ("", 0))
        width = next((width for width in widths if width.kind == kind), None)
        part = _Part(name) if width is None else _Part(name, kind, dim, width.kept[int(number)])
        parts[f"{LAYER_PREFIX}{new_number[int(number)]}.{rest}"] = part
    return parts


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        config = read_config(options.source)
        layers = config["num_hidden_layers"]
        _check_options(options)
        dropped = _chosen_layers(options, layers)
        kept = kept_layers(options.source, layers, dropped)
        widths = _chosen_widths(options, config, kept)
        prune(options.source, options.destination, dropped, widths)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    without = f", without {', '.join(map(str, dropped))}" if dropped else ""
    print(f"{options.destination}: {len(kept)} of {layers} layers{without}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.prune_layers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="Hugging Face folder")
    parser.add_argument("destination", type=Path, metavar="DST", help="folder to write")
    parser.add_argument("--drop", metavar="3,5,7", help="the layers to drop, counted from 0")
    parser.add_argument("--keep", type=int, metavar="N", help="number of layers to keep")
    parser.add_argument(
        "--from", type=int, dest="start", metavar="A", help="first layer that may be dropped (default 0)"
    )
    parser.add_argument(
        "--to", type=int, dest="stop", metavar="B", help="layer before which dropping ends (default: all)"
    )
    parser.add_argument("--by-influence", type=Path, metavar="TEXT", help="drop what changes this text least")
    parser.add_argument("--ffn", type=int, metavar="N", help="FFN channels to keep in each layer")
    parser.add_argument("--kv-groups", type=int, metavar="N", help="key/value groups to keep in each layer")
    parser.add_argument("--by-activation", type=Path, metavar="TEXT", help="keep the parts most active on it")
    parser.add_argument(
        "--tokens", type=int, default=1024, metavar="N", help="tokens of TEXT to measure on (default 1024)"
    )
    return parser


def _check_options(options: argparse.Namespace) -> None:
    depth = options.drop is not None or options.keep is not None
    width = options.ffn is not None or options.kv_groups is not None
    of_keep = (options.start, options.stop, options.by_influence)
    if options.drop is not None and options.keep is not None:
        raise UserError("--drop and --keep exclude each other: --drop names the layers, --keep counts them")
    if options.keep is None and any(value is not None for value in of_keep):
        raise UserError("--from, --to and --by-influence need --keep, the number of layers to keep")
    if not depth and not width:
        raise UserError("nothing to prune: give --drop or --keep, --ffn or --kv-groups")
    if width != (options.by_activation is not None):
        raise UserError("--ffn and --kv-groups go together with --by-activation, the text to measure on")
    if options.destination.exists():  # known before anything is measured
        raise UserError(f"{options.destination} exists already: remove it or choose another output folder")


def _chosen_layers(options: argparse.Namespace, layers: int) -> list[int]:
    if options.drop is not None:
        try:
            return sorted({int(number) for number in options.drop.split(",")})
        except ValueError:
            raise UserError(f"--drop {options.drop}: layer numbers with commas, such as 3,5,7") from None
    if options.keep is None:
        return []
    start, stop = options.start or 0, layers if options.stop is None else options.stop
    dropped = evenly_spaced(layers, options.keep, start, stop)  # refuses impossible numbers before measuring
    if options.by_influence is None:
        return dropped
    measured = _measured(options, options.by_influence, range(layers))
    influence = [measured[layer].influence for layer in range(layers)]
    dropped = least_influential(influence, options.keep, start, stop)
    _print_influence(influence, dropped)
    return dropped


def _chosen_widths(options: argparse.Namespace, config: dict, layers: Sequence[int]) -> list[Width]:
    sizes = {kind: getattr(options, OPTION[kind]) for kind in OPTION}
    for kind, size in sizes.items():
        parts = number_of(kind, config)
        if size is not None and not 1 <= size < parts:
            raise UserError(f"--{OPTION[kind].replace('_', '-')} {size}: must lie between 1 and {parts - 1}")
    if sizes[FFN] is not None and read_architecture(options.source).moe is not None:
        raise UserError(f"{options.source}: --ffn is for dense models, this one has experts")
    if options.by_activation is None:
        return []
    measured = _measured(options, options.by_activation, layers)
    widths = []
    for kind, size in sizes.items():
        if size is not None:
            scores = {layer: getattr(measured[layer], OPTION[kind]) for layer in layers}
            widths.append(most_active(kind, scores, size))
            print(f"{kind} {number_of(kind, config)} -> {size}, keeping {_shares(widths[-1], scores)}")
    return widths


def _measured(options: argparse.Namespace, text: Path, layers: Sequence[int]) -> "dict[int, Importance]":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
        from tools.prune_importance import measure, read_samples

    samples = read_samples(text, options.source, options.tokens)
    print(f"measured on {sum(map(len, samples))} tokens in {len(samples)} samples of {text}")
    return measure(options.source, samples, layers)


def _shares(width: Width, scores: Mapping[int, Tensor]) -> str:
    shares = [
        float(scores[layer][kept].sum() / total) if (total := scores[layer].sum()) > 0 else 1.0
        for layer, kept in width.kept.items()
    ]
    return f"{min(shares):.0%} to {max(shares):.0%} of a layer's activation"


def _print_influence(influence: Sequence[float], dropped: Sequence[int]) -> None:
    table = Table("layer", "influence", "")
    for layer, value in enumerate(influence):
        table.add_row(str(layer), f"{value:.4f}", "dropped" if layer in dropped else "")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
