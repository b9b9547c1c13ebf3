"""A student with experts against transformers' model in float64: gradients, balancing loss included, and metrics."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_opd.config.schema import OptimizerConfig
from megatron_opd.data.packing import Microbatch, count_loss_tokens, count_tokens, pack
from megatron_opd.objectives import Objective
from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.training.router_metrics import take_router_metrics
from tests.checkpoint.models import write_hf
from tests.tiny import VOCAB, recorded_rollouts
from tests.training.tiny_run import build_run, save_pair

LAYERS, EXPERTS, TOPK = 4, 4, 2
LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(data=2, expert=2),
    ParallelLayout(tensor=2, sequence_parallel=True),
    ParallelLayout(context=2, expert=2),
    ParallelLayout(tensor=2, sequence_parallel=True, pipeline=2, virtual_pipeline=2, expert=2),
]
BATCHES = {"several microbatches": (9, 96), "one microbatch": (9, 512), "a replica without tokens": (1, 96)}
COEFFICIENT = 0.5


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Students that differ in the coefficient of the balancing loss alone, and a teacher."""
    folder = tmp_path_factory.mktemp("models")
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 128}
    balanced: dict[str, Any] = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
    write_hf(folder / "plain", "qwen3_moe", tied=True, num_hidden_layers=LAYERS, **sizes)
    write_hf(folder / "balanced", "qwen3_moe", tied=True, num_hidden_layers=LAYERS, **sizes, **balanced)
    write_hf(folder / "teacher", "qwen3_moe", tied=False, norm_topk_prob=False, **sizes)
    return folder


def packed(layout: ParallelLayout, batch: str) -> list[list[Microbatch]]:
    rollouts, budget = BATCHES[batch]
    return pack(
        recorded_rollouts(rollouts),
        dp_size=layout.data,
        token_budget=budget,
        alignment=layout.segment_alignment,
        count_multiple=layout.microbatch_multiple,
    )


def ours(
    layout: ParallelLayout, models: Path, student: str, batch: str, recompute: str = "none"
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Main gradients and router metrics of one update."""
    run = build_run(
        layout,
        models,
        student_name=student,
        objective=Objective(),
        optimizer=OptimizerConfig(distributed=False),
        recompute=recompute,
    )
    microbatches = packed(layout, batch)
    run.accumulate(microbatches)
    metrics = take_router_metrics(run.student.chunks, run.groups)
    assert take_router_metrics(run.student.chunks, run.groups) == {}, "taken"
    return run.gradients(), metrics


def segments(microbatch: Microbatch) -> list[slice]:
    """Where the sequences lie, without their padding."""
    offsets = microbatch.cu_seqlens.tolist()
    return [
        slice(start, start + int((~microbatch.padding_T[start:end]).sum()))
        for start, end in pairwise(offsets)
    ]


def balancing_loss(router_logits: list[Tensor]) -> Tensor:
    """Sum over layers of E * sum_e f_e P_e over the tokens of one microbatch; an entry of `router_logits` a layer."""
    total = torch.zeros((), dtype=torch.float64)
    for logits_TE in router_logits:
        chosen = F.one_hot(logits_TE.topk(TOPK).indices, EXPERTS).sum(1).double()
        total = total + EXPERTS * (chosen.mean(0) / TOPK * logits_TE.softmax(-1).mean(0)).sum()
    return total


def metrics_of(router_logits: list[Tensor]) -> dict[str, float]:
    """What a step logs of tokens routed so; an entry of `router_logits` [T, E] a layer."""
    logits_LTE = torch.stack(router_logits)
    counts_LE = F.one_hot(logits_LTE.topk(TOPK).indices, EXPERTS).sum((1, 2)).double()
    entropy_LT = torch.distributions.Categorical(logits=logits_LTE).entropy()
    return {
        "moe/load_balancing_loss": float(balancing_loss(router_logits)) / LAYERS,
        "moe/max_load": float(counts_LE.max() / counts_LE[0].mean()),
        "moe/router_entropy": float(entropy_LT.mean()),
    }


def expected(
    models: Path, microbatches: list[Microbatch], coefficient: float
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients of mean reverse KL + coefficient * balancing loss, the microbatches weighted by tokens; metrics."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(models / name, experts_implementation="eager").double()
        for name in ("plain", "teacher")
    )
    routed: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    everything: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    for place, layer in enumerate(student.model.layers):
        layer.mlp.gate.register_forward_hook(lambda *args, place=place: routed[place].append(args[2][0]))
    tokens, loss_tokens = count_tokens(microbatches), count_loss_tokens(microbatches)
    loss = torch.zeros((), dtype=torch.float64)
    for microbatch in microbatches:
        for logits in routed:
            logits.clear()
        for where in segments(microbatch):
            if where.start == where.stop:
                continue
            ids, mask = microbatch.tokens_T[None, where], microbatch.mask_T[where]
            p_s = student(ids).logits[0, mask].log_softmax(-1)
            with torch.no_grad():
                p_t = teacher(ids).logits[0, mask].log_softmax(-1)
            loss = loss + (p_s.exp() * (p_s - p_t)).sum() / loss_tokens
        if routed[0]:
            share = count_tokens([microbatch]) / tokens
            loss = loss + coefficient * share * balancing_loss([torch.cat(logits) for logits in routed])
        for layer, logits in zip(everything, routed, strict=True):
            layer += [each.detach() for each in logits]
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    return gradients, metrics_of([torch.cat(logits) for logits in everything])


def as_transformers(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our gradients under the names that a transformers model has in memory: experts stacked, gate and up joined."""
    stacked = {name: tensor for name, tensor in gradients.items() if ".experts." not in name}
    for layer in range(LAYERS):
        mlp = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            [gradients[f"{mlp}.{e}.{part}_proj.weight"] for e in range(EXPERTS)]
            for part in ("gate", "up", "down")
        )
        stacked[f"{mlp}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        stacked[f"{mlp}.down_proj"] = torch.stack(down)
    return stacked


def check(gloo: Any, models: Path, layout: ParallelLayout, student: str, batch: str, **options: Any) -> None:
    microbatches = [each for rank in packed(layout, batch) for each in rank]
    wanted, metrics = expected(models, microbatches, COEFFICIENT if student == "balanced" else 0.0)
    assert wanted["model.layers.1.mlp.gate.weight"].abs().max() > 1e-3
    for gradients, found in gloo(layout.world_size, ours, layout, models, student, batch, **options):
        found_gradients = as_transformers(gradients)
        assert found_gradients.keys() == wanted.keys()
        for name, gradient in found_gradients.items():
            assert (gradient - wanted[name]).abs().max() < 1e-5, name
        assert found == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("student", ["plain", "balanced"])
def test_gradients_and_metrics_are_those_of_transformers(gloo, models, layout, student):
    """Router, experts and the rest, with and without the balancing loss; microbatches of very uneven length."""
    check(gloo, models, layout, student, "several microbatches")


@pytest.mark.parametrize(
    ("layout", "batch"),
    [
        (ParallelLayout(), "one microbatch"),
        (ParallelLayout(data=2, expert=2), "one microbatch"),
        (ParallelLayout(data=2, expert=2), "a replica without tokens"),
        (ParallelLayout(tensor=2, sequence_parallel=True, expert=2), "a replica without tokens"),
    ],
    ids=str,
)
def test_the_balancing_loss_keeps_its_scale(gloo, models, layout, batch):
    """However many microbatches and ranks there are, also beside one with padding alone."""
    check(gloo, models, layout, "balanced", batch)


def test_recompute_counts_every_token_once(gloo, models):
    check(gloo, models, ParallelLayout(), "balanced", "several microbatches", recompute="full")


def test_metrics_do_not_depend_on_the_packing(gloo, models):
    """They are of all tokens of the step together; the microbatches differ, and so does the padding."""
    one, other = (
        gloo(layout.world_size, ours, layout, models, "plain", "several microbatches")[0][1]
        for layout in (LAYOUTS[0], LAYOUTS[-1])
    )
    assert len(one) == 3 and other == pytest.approx(one, rel=1e-5)


def dense_metrics(folder: Path) -> dict[str, float]:
    run = build_run(ParallelLayout(), folder)
    run.forward_backward(0)
    return take_router_metrics(run.student.chunks, run.groups)


def test_a_dense_student_logs_nothing_of_it(gloo, tmp_path):
    save_pair(tmp_path)
    assert gloo(1, dense_metrics, tmp_path) == [{}]
