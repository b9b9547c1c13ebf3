"""The recipes of examples/cross_scale: each fits its GPUs, and its files train models of its architectures, tiny."""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_opd.cli import main
from megatron_opd.config.layout_checks import processes_of_run
from megatron_opd.config.load import load_config
from megatron_opd.plan.hardware import load_hardware
from megatron_opd.plan.plan import Plan
from tests.data.tiny_tokenizer import save_tokenizer, write_prompts
from tests.forked import forking

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "examples/cross_scale").glob("qwen3-*.yaml"))
TINY = {
    "vocab_size": 250,
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}
TINY_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
STEPS = 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_and_is_in_the_table(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(path, [])
    plan = Plan.of(config, processes_of_run(config), load_hardware("h100-80gb"))
    assert plan.fits and plan.setting.separate and plan.teacher_span is not None
    sizes = [max(one.total for one in each) / 2**30 for each in (plan.memory, plan.teacher_memory)]
    layouts = [f"{each.world_size}: {each}" for each in (plan.setting.layout, plan.setting.teaching.layout)]
    numbers = [*sizes, plan.seconds, plan.teacher_span.total, plan.hidden_seconds]
    row = [f"[{path.stem}]({path.name})", *layouts, *(f"{number:.3g}" for number in numbers)]
    line = f"| {' | '.join(row)} |"
    assert line in (path.parent / "recipes.md").read_text(), line


def tiny(source: Path, folder: Path, **sizes: Any) -> None:
    """A random model of the architecture of `source`."""
    numbers = json.loads((source / "config.json").read_text())
    if "num_experts" in numbers:
        sizes |= TINY_EXPERTS
    torch.manual_seed(0)
    config = AutoConfig.for_model(**numbers | TINY | sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    save_tokenizer(folder)


def dry(path: Path, folder: Path) -> Path:
    """The recipe with such models, a process for each, and few tokens."""
    tree = yaml.safe_load(path.read_text())
    for role, layers in (("student", 2), ("teacher", 4)):
        tiny(ROOT / tree[role]["path"], folder / role, num_hidden_layers=layers)
        tree[role]["path"] = str(folder / role)
    write_prompts(folder / "prompts.jsonl", 8)
    tree["run_dir"] = str(folder / "run")
    tree["data"] |= {"prompts": str(folder / "prompts.jsonl"), "max_prompt_tokens": 32}
    tree["parallel"], tree["teacher"]["parallel"] = {}, {"separate": True}
    tree["rollout"] |= {"prompts_per_step": 4, "max_new_tokens": 8}
    tree["training"] |= {"steps": STEPS, "microbatch_tokens": 64}
    (folder / "dry.yaml").write_text(yaml.safe_dump(tree))
    return folder / "dry.yaml"


def train(config: Path, rank: int, port: int) -> None:
    """One of the run's two processes, in this one."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    said = config.with_name(f"rank-{rank}.log").open("w")
    os.dup2(said.fileno(), sys.stdout.fileno())
    os.dup2(said.fileno(), sys.stderr.fileno())
    main(["train", str(config)])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_tiny_models(path: Path, tmp_path: Path) -> None:
    config = dry(path, tmp_path)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    processes = [forking().Process(target=train, args=(config, rank, port)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    said = "".join(log.read_text() for log in sorted(tmp_path.glob("rank-*.log")))
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0], said
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["grad_norm"] > 0 and not row["skipped"] for row in rows)
    assert (tmp_path / "run/hf/config.json").is_file()
