"""Trains the teachers and students of the studies from scratch: small Qwen3-shaped models that learn worked steps.

The teacher learns to the end, and then solves more than 90 % of the problems; a student is stopped on the way, as soon
as it solves the share that its name promises. `make_models` writes them as Hugging Face folders, with prompts and
problems beside.
"""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from examples.papers.tasks import IDS, VOCABULARY, Maker, Problem, decode, encode, tokenizer, write_problems
from megatron_opd.errors import UserError

disable_progress_bar()

PAD, EOS = IDS["<pad>"], IDS["<eos>"]
CHECK_EVERY = 20  # steps between two looks at a student that has to be stopped
WARM_UP = 50
IGNORED = -100


@dataclass(frozen=True)
class Learner:
    """A model to be trained on worked problems, and what is kept of it: after all steps, or on the way."""

    hidden: int
    layers: int
    steps: int
    stages: dict[
        str, float | None
    ]  # name -> share of the problems solved at which it is kept; None: at the end
    spelt_out: bool = False  # with the other spelling of <answer>
    batch: int = 128
    lr: float = 2e-3
    seed: int = 1


@dataclass(frozen=True)
class Recipe:
    """What a study needs: models by training, and the tasks that they are trained and tested on."""

    learners: tuple[Learner, ...]
    tasks: dict[str, Maker]
    max_new_tokens: int
    supervised: int = 20000  # problems of each task for the trainings
    prompts: int = 8192  # of each task for the distillation
    held_out: int = 256

    @property
    def described(self) -> str:
        """All of it as text, by which models of another recipe are known."""
        tasks = {name: make.keywords for name, make in self.tasks.items()}
        return str((self.learners, tasks, self.max_new_tokens, self.supervised, self.prompts, self.held_out))

    @property
    def folder(self) -> str:
        """A name for the folder of its models that no other recipe has."""
        return f"models-{hashlib.sha256(self.described.encode()).hexdigest()[:8]}"


def build(size: Learner) -> Qwen3ForCausalLM:
    """A Qwen3 of random weights."""
    torch.manual_seed(size.seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(VOCABULARY),
            hidden_size=size.hidden,
            intermediate_size=3 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=size.hidden // 4,
            max_position_embeddings=512,
            rope_theta=10000.0,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


def padded(problems: Sequence[Problem], spelt_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and targets [B, S] of prompts with their responses; only responses are targets."""
    rows = [(encode(each.prompt), [*encode(each.response, spelt_out=spelt_out), EOS]) for each in problems]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids_BS = torch.full((len(rows), longest), PAD)
    target_BS = torch.full((len(rows), longest), IGNORED)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids_BS[row, :end] = torch.tensor([*prompt, *response])
        target_BS[row, len(prompt) : end] = torch.tensor(response)
    return ids_BS, target_BS


@torch.no_grad()
def solved(model: Qwen3ForCausalLM, problems: Sequence[Problem], max_new_tokens: int) -> float:
    """Share of the problems that one response at temperature 1 solves."""
    prompts = [encode(each.prompt) for each in problems]
    longest = max(map(len, prompts))
    ids_BS = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    drawn_BS = model.eval().generate(
        ids_BS,
        attention_mask=(ids_BS != PAD).long(),
        max_new_tokens=max_new_tokens,
        do_sample=True,
        top_k=0,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model.train()
    texts = [decode(row) for row in drawn_BS[:, longest:].tolist()]
    ends = [f"<answer>{each.answer}</answer>" for each in problems]
    return sum(text.endswith(end) for text, end in zip(texts, ends, strict=True)) / len(problems)


def learn(
    size: Learner, train: Sequence[Problem], test: Sequence[Problem], max_new_tokens: int
) -> Iterator[tuple[str, float, Qwen3ForCausalLM]]:
    """Train a model; yields the name of every stage that is reached, the share that it solves, and the model."""
    model, draw = build(size), random.Random(size.seed)
    waiting = dict(sorted(size.stages.items(), key=lambda stage: 2.0 if stage[1] is None else stage[1]))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=size.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - 0.95 * step / size.steps)
    )
    for step in range(1, size.steps + 1):
        ids_BS, target_BS = padded(draw.sample(train, size.batch), size.spelt_out)
        logits_BSV = model(ids_BS).logits
        loss = cross_entropy(
            logits_BSV[:, :-1].flatten(0, 1), target_BS[:, 1:].flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        last = step == size.steps
        if last or (step % CHECK_EVERY == 0 and any(bound is not None for bound in waiting.values())):
            share = solved(model, test, max_new_tokens)
            for name, bound in list(waiting.items()):
                if last and bound is not None and share < bound:
                    raise UserError(
                        f"{name}: solves {share:.0%} after {step} steps, not {bound:.0%}: train it for longer"
                    )
                if last or (bound is not None and share >= bound):
                    del waiting[name]
                    yield name, share, model
        if not waiting:
            return


def make_models(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> dict[str, float]:
    """Write the models, prompts and problems of a recipe below `folder`, and return the share each model solves.

    What is there already, of the same recipe, is used again.
    """
    record = folder / "recipe.json"
    described = recipe.described
    if record.is_file() and (found := json.loads(record.read_text()))["recipe"] == described:
        return dict(found["solved"])
    shutil.rmtree(folder, ignore_errors=True)
    for name, make in recipe.tasks.items():
        write_problems(folder / f"{name}.prompts.jsonl", make(recipe.prompts, 2))
        write_problems(folder / f"{name}.held_out.jsonl", make(recipe.held_out, 3))
    shares: dict[str, float] = {}
    context = multiprocessing.get_context("spawn")
    with context.Pool(os.cpu_count()) as pool:
        for made in pool.imap_unordered(partial(_make, recipe, folder), recipe.learners):
            for name, parameters, share in made:
                shares[name] = share
                say(f"{name}: {parameters:,} parameters, solves {share:.0%}")
    record.write_text(json.dumps({"recipe": described, "solved": shares}, indent=2) + "\n")
    return shares


def _make(recipe: Recipe, folder: Path, size: Learner) -> list[tuple[str, int, float]]:
    torch.set_num_threads(1)
    train = [problem for make in recipe.tasks.values() for problem in make(recipe.supervised, 1)]
    test = next(iter(recipe.tasks.values()))(recipe.held_out, 4)
    made = []
    for name, share, model in learn(size, train, test, recipe.max_new_tokens):
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
        made.append((name, sum(parameter.numel() for parameter in model.parameters()), share))
    return made
