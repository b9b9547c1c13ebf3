"""What each layer, FFN channel and key/value group of a Hugging Face folder does to a calibration text.

The measurements behind `tools.prune_layers --by-influence` and `--by-activation`. The text goes through the model
layer by layer, each as a plain transformers model of that one layer in float32, so that memory holds one layer and
the hidden states of the text. On a GPU where torch offers one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from megatron_opd.checkpoint.hf_import import HfReader, check_hf_weights
from megatron_opd.data.jsonl import read_rows
from megatron_opd.data.prompts import load_prompts
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import read_architecture, read_config_json
from megatron_opd.models.families.rows import EMBEDDING

SAMPLE_TOKENS = 512  # a sample is cut to as many
BATCH_TOKENS = 4096  # at most these go through a layer at once


@dataclass(frozen=True)
class Importance:
    """What one layer, and each part of it, does to the calibration text.

    `influence` is 1 minus the mean cosine similarity of a token's hidden states before and after the layer: 0 for
    a layer that changes no direction. `kv_groups` [groups] is the mean length of what a group's heads add to a token's
    hidden state, `ffn` [channels] the mean magnitude of an activation; both float32 on the CPU. `ffn` is None where
    experts take the FFN's place.
    """

    influence: float
    kv_groups: Tensor
    ffn: Tensor | None


@dataclass
class _Batch:
    hidden: Tensor  # [samples, length, hidden]
    mask: Tensor  # [samples, length], True at tokens, False at padding


def read_samples(file: Path, folder: Path, max_tokens: int) -> list[list[int]]:
    """Token ids of the calibration text's first samples, `max_tokens` in all, by the folder's tokenizer.

    A JSONL file holds one sample a line, in the field `prompt` (rendered as in training, chat template applied) or
    `text`; any other file is plain text, one sample a line. Raises UserError for a file or tokenizer that cannot be
    read or does not fit the model, and for a file without text.
    """
    if max_tokens < 2:
        raise UserError(f"--tokens {max_tokens}: measuring takes 2 tokens or more")
    if not file.is_file():
        raise UserError(f"{file}: no such calibration text")
    samples: list[list[int]] = []
    left = max_tokens
    config = read_config_json(folder)
    longest = min(SAMPLE_TOKENS, config.get("max_position_embeddings", SAMPLE_TOKENS))
    for ids in _tokenise(file, folder):
        cut = list(ids[: min(longest, left)])
        samples += [cut] if cut else []
        left -= len(cut)
    if not samples:
        raise UserError(f"{file}: holds no text to measure on")
    largest = max(map(max, samples))
    if largest >= config["vocab_size"]:
        raise UserError(
            f"{folder}: its tokenizer has the id {largest}, its model only ids below {config['vocab_size']}"
        )
    return samples


def measure(folder: Path, samples: Sequence[Sequence[int]], layers: Sequence[int]) -> dict[int, Importance]:
    """Layer -> its importance, on the samples' way through the decoder layers `layers` (ascending) alone.

    Raises UserError for a folder whose weights cannot be read.
    """
    logging.disable_progress_bar()
    config, reader = read_config_json(folder), HfReader(folder)
    check_hf_weights(reader, read_architecture(folder))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = _embedded(samples, reader.read(EMBEDDING, 0, 0, config["vocab_size"]), device)
    console = Console(stderr=True)
    shown = track(
        layers, "measuring layers", console=console, transient=True, disable=not console.is_terminal
    )
    return {layer: _pass_through(_one_layer(config, reader, layer).to(device), batches) for layer in shown}


def _tokenise(file: Path, folder: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    if file.suffix in (".jsonl", ".json"):
        if _field(file) == "prompt":
            loaded = load_prompts(file, tokenizer, max_prompt_tokens=10**9)
            return [prompt.token_ids for prompt in loaded.prompts]
        texts = [row["text"] for _, row in read_rows(file, "text")]
    else:
        try:
            texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise UserError(f"{file}: not UTF-8 text") from None
    return [list(ids) for ids in tokenizer(texts)["input_ids"]] if texts else []


def _field(file: Path) -> str:
    """Which field the samples are in, by the first line; a line that cannot be read is `read_rows`'s to name."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise UserError(f"{file}: holds no text to measure on")
    try:
        row = json.loads(first)
    except json.JSONDecodeError:
        return "prompt"
    if isinstance(row, dict) and row and not {"prompt", "text"} & row.keys():
        names = ", ".join(sorted(row))
        raise UserError(f"{file}: its lines need a field 'prompt' or 'text' (there are: {names})")
    return "text" if isinstance(row, dict) and "prompt" not in row and "text" in row else "prompt"


def _embedded(samples: Sequence[Sequence[int]], table: Tensor, device: torch.device) -> list[_Batch]:
    """Samples of similar length side by side, padded at the end, where causal attention does not look."""
    batches = []
    ordered = sorted(samples, key=len, reverse=True)
    while ordered:
        longest = len(ordered[0])
        count = max(1, BATCH_TOKENS // longest)
        rows, ordered = ordered[:count], ordered[count:]
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        mask = torch.arange(longest) < torch.tensor([[len(row)] for row in rows])
        batches.append(_Batch(table[ids].float().to(device), mask.to(device)))
    return batches


def _one_layer(config: dict, reader: HfReader, layer: int) -> Any:
    """A transformers model that is this layer alone: hidden states in, hidden states out."""
    # What config.json lists per layer is the same for every layer of a supported model.
    alone = {"num_hidden_layers": 1, "layer_types": None, "vocab_size": 1}
    alone |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    hf_config = AutoConfig.for_model(**config | alone)
    prefix = f"model.layers.{layer}."
    weights = {
        f"layers.0.{name.removeprefix(prefix)}": reader.read(name, 0, 0, 2**62)
        for name in reader.names
        if name.startswith(prefix)
    }
    # Not used, but transformers warns of weights that it has to make up.
    weights["embed_tokens.weight"] = torch.zeros(1, config["hidden_size"])
    weights["norm.weight"] = torch.ones(config["hidden_size"])
    with torch.device("meta"):
        model_class: Any = type(AutoModel.from_config(hf_config))
    model = model_class.from_pretrained(None, config=hf_config, state_dict=weights, dtype=torch.float32)
    model.norm = nn.Identity()
    return model.eval()


@torch.no_grad()
def _pass_through(model: Any, batches: Sequence[_Batch]) -> Importance:
    """Measure the layer, leaving its output in the batches."""
    layer = model.layers[0]
    out, down = layer.self_attn.o_proj, getattr(layer.mlp, "down_proj", None)
    # Nothing in `seen` may refer to a module: the cycle would keep one layer after another in memory.
    seen: dict[str, Tensor] = {}
    out.register_forward_pre_hook(lambda module, inputs: seen.update(heads=inputs[0]))
    if down is not None:
        down.register_forward_pre_hook(lambda module, inputs: seen.update(channels=inputs[0]))
    similar, groups, channels, tokens = 0.0, torch.zeros(()), torch.zeros(()), 0
    for batch in batches:
        before = batch.hidden
        batch.hidden = model(
            inputs_embeds=before, attention_mask=batch.mask.long(), use_cache=False
        ).last_hidden_state
        cosine = nn.functional.cosine_similarity(before[batch.mask], batch.hidden[batch.mask], dim=-1)
        similar += float(cosine.double().sum())
        groups = groups + _added_by_groups(
            seen["heads"][batch.mask], out.weight, model.config.num_key_value_heads
        )
        if down is not None:
            channels = channels + seen["channels"][batch.mask].abs().sum(0).cpu()
        tokens += len(cosine)
    return Importance(1 - similar / tokens, groups / tokens, channels / tokens if down is not None else None)


def _added_by_groups(heads_out: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Summed over tokens: the length of what each group's heads add to the hidden state. [groups]"""
    parts = zip(heads_out.chunk(groups, dim=1), weight.chunk(groups, dim=1), strict=True)
    return torch.stack([(heads @ columns.T).norm(dim=-1).sum() for heads, columns in parts]).cpu()
