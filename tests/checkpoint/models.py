"""Small random Hugging Face models of every family, and the forward pass of a folder at a layout."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_opd.checkpoint.hf_export import export_hf_tensors
from megatron_opd.checkpoint.hf_families import stage_parameters
from megatron_opd.checkpoint.weights import load_model_weights
from megatron_opd.models.architecture import read_architecture
from megatron_opd.models.gpt import GPT, build_gpt, packed_forward
from megatron_opd.models.lm_head import logits_shard, select_positions
from megatron_opd.parallel import cpu
from megatron_opd.parallel.groups import ParallelLayout, build_groups
from megatron_opd.parallel.schedule import run_schedule

VOCAB = 131  # at TP 2 the second shard of 128 rows holds 3 real ones
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 16, "sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 24}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "head_dim": 24,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
}
TOKENS = torch.arange(40) * 7 % VOCAB


def write_hf(
    folder: Path,
    family: str,
    *,
    tied: bool,
    vocab_size: int = VOCAB,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **settings: Any,
) -> Path:
    """A Hugging Face folder with random weights, biases and norms (transformers starts those at 0 and 1).

    `settings` go into its config.json.
    """
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(1)
    settings = {**SIZES, **extra, "vocab_size": vocab_size, "tie_word_embeddings": tied, **settings}
    config = config_class(**settings)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            else:
                parameter.mul_(4)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def hf_model(folder: Path) -> torch.nn.Module:
    """The folder in plain transformers."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def hf_logits(folder: Path) -> Tensor:
    """transformers' logits [T, V] of `TOKENS`."""
    with torch.no_grad():
        return hf_model(folder)(TOKENS[None]).logits[0]


def megatron_results(
    folder: Path, layout: ParallelLayout, precision: str = "fp32"
) -> tuple[Tensor | None, dict[str, Tensor], float]:
    """On one rank: (logits [T, V] of `TOKENS`, last stage only; exported tensors; sum of |padding rows|)."""
    cpu.install()
    groups = build_groups(layout)
    arch = read_architecture(folder)
    padded = arch.padded_vocab_size(layout.tensor)
    chunks = build_gpt(arch, layout, groups, precision=precision, padded_vocab_size=padded)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.eval().parameters():
                parameter.fill_(99.0)  # nothing may keep its first value
    load_model_weights(chunks, arch, folder, groups=groups, padded_vocab_size=padded)
    logits = _logits(chunks, layout, groups)
    exported = {name: tensor.clone() for name, tensor in export_hf_tensors(chunks, arch, groups)}
    real_rows = max(arch.vocab_size - groups.tp.rank() * padded // layout.tensor, 0)
    padding = (
        float(parameter[real_rows:].detach().abs().sum())
        for name, parameter in stage_parameters(chunks).items()
        if "layers" not in name and "norm" not in name
    )
    return None if logits is None else logits[:, : arch.vocab_size], exported, max(padding, default=0.0)


@torch.no_grad()
def _logits(chunks: list[GPT], layout: ParallelLayout, groups: ProcessGroupCollection) -> Tensor | None:
    """Logits [T, padded V] of `TOKENS`, gathered; None but on the last stage."""
    positions, offsets = torch.arange(len(TOKENS)), torch.tensor([0, len(TOKENS)], dtype=torch.int32)

    def forward_step(inputs, chunk):
        hidden = packed_forward(chunk, next(inputs), positions, offsets)
        return hidden, lambda output, non_loss_data: select_positions(
            output, positions, group=groups.tp, sequence_parallel=layout.sequence_parallel
        )

    inputs = [TOKENS] * layout.microbatch_multiple
    outputs = run_schedule(forward_step, inputs, chunks, groups, forward_only=True, collect=True)
    if not outputs:
        return None
    shard = logits_shard(outputs[0], chunks[-1].head_weight, groups.tp)
    shards = [torch.empty_like(shard) for _ in range(layout.tensor)]
    dist.all_gather(shards, shard, group=groups.tp)
    return torch.cat(shards, dim=1)


def safetensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by name."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_identical(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
