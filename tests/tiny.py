"""Tiny random models as Hugging Face folders, and recorded rollouts, for tests of whole paths."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from megatron_opd.data.rollouts import Rollout

VOCAB = 250  # no multiple of anything: the embedding is padded
CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}


def save_tiny_model(
    folder: Path,
    *,
    family: str = "qwen3",
    seed: int = 0,
    layers: int = 4,
    hidden: int = 64,
    tied: bool = True,
    vocab: int = VOCAB,
) -> PreTrainedModel:
    """Write a random float32 model with 4 heads and 2 key/value groups; returns it."""
    sizes = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "initializer_range": 0.2,  # far from uniform logits
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "qwen3":
        sizes["head_dim"] = 16
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**sizes), dtype=torch.float32)
    model.save_pretrained(folder)
    return model


def recorded_rollouts(count: int, *, seed: int = 0, longest: int = 30) -> list[Rollout]:
    """Random rollouts of very uneven lengths, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

    rollouts = []
    for i in range(count):
        prompt_length, length = torch.randint(1, longest, (2,), generator=generator).tolist()
        logprobs = (-5 * torch.rand(length, generator=generator)).tolist()
        rollouts.append(Rollout(str(i), 0, ids(prompt_length), ids(length), logprobs, "length", 0))
    return rollouts


def with_teacher_prompts(rollouts: list[Rollout]) -> list[Rollout]:
    """With prompts of the teacher's own, some longer and some shorter than the student's."""
    return [
        replace(rollout, teacher_prompt_ids=[200 + i] + rollout.prompt_ids[i % 3 :] + [249] * (4 * i % 11))
        for i, rollout in enumerate(rollouts)
    ]
