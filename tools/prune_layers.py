"""Depth pruning: drops whole decoder layers of a Hugging Face folder, evenly spread over a range of them.

Usage: python -m tools.prune_layers SRC DST --keep 24 --from 8 --to 26

The first and the last layers of a language model matter most, so the dropped ones lie between. Works on the
safetensors files tensor by tensor, without building the model.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from megatron_opd.checkpoint.folders import written_aside
from megatron_opd.errors import UserError

LAYER = re.compile(r"^(.*\blayers\.)(\d+)(\..*)$")


def evenly_spaced(layers: int, keep: int, start: int, stop: int) -> list[int]:
    """The `layers - keep` layers to drop, ascending (0-based): evenly spaced over [start, stop).

    Raises UserError when there are not that many to drop.
    """
    drop = layers - keep
    if keep < 1 or drop < 1 or start < 0 or stop > layers or drop > stop - start:
        raise UserError(
            f"cannot keep {keep} of {layers} layers dropping only from layers {start} to {stop - 1}: "
            f"--keep must lie between {max(1, layers - max(stop - start, 0))} and {layers - 1}, --from and --to "
            f"between 0 and {layers}"
        )
    return [start + i * (stop - start) // drop for i in range(drop)]


def prune(source: Path, destination: Path, dropped: Sequence[int]) -> None:
    """Copy the HF folder without the decoder layers `dropped` (0-based) and number the others anew.

    Peak memory: one safetensors file. Raises UserError when the source is not a HF folder with safetensors or
    lacks a layer that is to be dropped, and when the destination exists or cannot be written.
    """
    config = read_config(source)
    layers = config["num_hidden_layers"]
    if not set(dropped) <= set(range(layers)):
        raise UserError(
            f"{source}: has layers 0 to {layers - 1}; cannot drop {sorted(set(dropped) - set(range(layers)))}"
        )
    kept = [layer for layer in range(layers) if layer not in set(dropped)]
    new_number = {old: new for new, old in enumerate(kept)}
    with written_aside(destination) as aside:
        index: dict[str, str] = {}
        size = 0
        files = sorted(source.glob("*.safetensors"))
        for file in files:
            written, bytes_written = _copy_tensors(file, aside / file.name, new_number)
            index.update(dict.fromkeys(written, file.name))
            size += bytes_written
        if len(files) > 1:
            content = {"metadata": {"total_size": size}, "weight_map": index}
            _write_json(aside / "model.safetensors.index.json", content)
        for file in source.iterdir():
            if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
                shutil.copy2(file, aside / file.name)
        _write_json(aside / "config.json", pruned_config(config, kept))


def read_config(source: Path) -> dict:
    """config.json of a HF folder that has safetensors. Raises UserError otherwise."""
    file = source / "config.json"
    if not file.is_file():
        raise UserError(f"{source}: not a Hugging Face model folder (no config.json)")
    config = json.loads(file.read_text(encoding="utf-8"))
    if "num_hidden_layers" not in config:
        raise UserError(f"{file}: has no num_hidden_layers")
    if not any(source.glob("*.safetensors")):
        raise UserError(f"{source}: holds no *.safetensors file; save the model with safetensors first")
    return config


def pruned_config(config: dict, kept: Sequence[int]) -> dict:
    """The configuration with the new number of layers; settings listed per layer keep the entries of the kept
    ones."""
    layers = config["num_hidden_layers"]
    per_layer = {
        key: [value[layer] for layer in kept]
        for key, value in config.items()
        if key == "layer_types" and isinstance(value, list) and len(value) == layers
    }
    return config | per_layer | {"num_hidden_layers": len(kept)}


def _copy_tensors(source: Path, destination: Path, new_number: dict[int, int]) -> tuple[list[str], int]:
    tensors = {}
    with safe_open(source, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (a safe_open handle is not iterable)
            match = LAYER.match(name)
            if match is None:
                tensors[name] = file.get_tensor(name)
            elif int(match[2]) in new_number:
                tensors[f"{match[1]}{new_number[int(match[2])]}{match[3]}"] = file.get_tensor(name)
    if tensors:
        save_file(tensors, destination, metadata={"format": "pt"})
    return list(tensors), sum(tensor.nbytes for tensor in tensors.values())


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.prune_layers", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="SRC", help="Hugging Face folder")
    parser.add_argument("destination", type=Path, metavar="DST", help="folder to write")
    parser.add_argument("--keep", type=int, required=True, help="number of layers to keep")
    parser.add_argument(
        "--from", type=int, default=0, dest="start", help="first layer that may be dropped (default 0)"
    )
    parser.add_argument("--to", type=int, dest="stop", help="layer before which dropping ends (default: all)")
    options = parser.parse_args(arguments)
    try:
        layers = read_config(options.source)["num_hidden_layers"]
        dropped = evenly_spaced(layers, options.keep, options.start, options.stop or layers)
        prune(options.source, options.destination, dropped)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.destination}: {options.keep} of {layers} layers, without {', '.join(map(str, dropped))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
