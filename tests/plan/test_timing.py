"""Seconds of a step: the counts that they rest on, and how they answer to the hardware and the layout."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_opd.config.schema import Config
from megatron_opd.models.gpt import packed_forward
from megatron_opd.plan.hardware import Hardware, load_hardware
from megatron_opd.plan.plan import Plan
from megatron_opd.plan.timing import BACKWARD, FORWARD, LIMITS
from tests.gloo_pool import GlooPools
from tests.plan.runs import config, ranks_of
from tools.bench.plan_check import Built, Sizes

_NO_KERNEL = {
    *(
        "view",
        "_unsafe_view",
        "reshape",
        "as_strided",
        "alias",
        "detach",
        "slice",
        "select",
        "unbind",
        "unfold",
    ),
    *("t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "split", "split_with_sizes", "chunk"),
    *(
        "empty",
        "new_empty",
        "empty_like",
        "empty_strided",
        "new_empty_strided",
        "lift_fresh",
        "_local_scalar_dense",
    ),
}


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name not in _NO_KERNEL:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def started(planned: Config) -> tuple[int, int]:
    """Operations that the forward and the backward pass of a microbatch start."""
    built = Built.of(planned)
    model, microbatch = built.student.chunks[0], built.microbatches[0]
    with _Operations() as forward:
        hidden = packed_forward(model, microbatch.tokens_T, microbatch.position_ids_T, microbatch.cu_seqlens)
    with _Operations() as backward:
        hidden.backward(torch.ones_like(hidden))
    return sum(forward.names.values()), sum(backward.names.values())


@pytest.mark.parametrize("experts", [0, 8])
def test_operations_that_a_layer_starts(
    gloo: GlooPools, tmp_path_factory: pytest.TempPathFactory, experts: int
) -> None:
    """The constants, within a tenth: two layers more in the same model."""
    counts = []
    for layers in (2, 4):
        sizes = Sizes(layers=layers, hidden=128, vocab=1000, length=127 + layers, batch=4, experts=experts)
        folder = tmp_path_factory.getbasetemp() / "plan"
        counts.append(gloo(1, started, config(folder, sizes))[0])
    for known, fewer, more in zip((FORWARD, BACKWARD), *counts, strict=True):
        expected = known.routed + experts * known.expert if experts else known.dense
        assert (more - fewer) / 2 == pytest.approx(expected, rel=0.1)


def plan_of(folder: Path, hardware: Hardware, **overrides: Any) -> Plan:
    planned = config(folder, rollout__prompts_per_step=32, rollout__max_new_tokens=128, **overrides)
    return Plan.of(planned, ranks_of(planned), hardware)


def test_every_number_of_the_hardware_counts(tmp_path: Path) -> None:
    """Doubling what is slow shortens the phases that it binds, and only those."""
    h100 = load_hardware("h100-80gb")
    slow = h100.model_copy(update={"launch": 0.0, "achieved": 1e-6})
    fast = slow.model_copy(update={"achieved": 2e-6})
    before, after = (plan_of(tmp_path, hardware).spans["training"] for hardware in (slow, fast))
    assert before.limit == "arithmetic" and after.total == pytest.approx(before.total / 2)

    starting = h100.model_copy(update={"launch": 1e6})
    assert all(
        plan_of(tmp_path, starting).spans[name].limit == "kernel starts" for name in ("decoding", "training")
    )

    narrow = h100.within_node.model_copy(update={"bandwidth": 1e-3})
    layout = {"parallel__tensor": 4}
    before, after = (
        plan_of(tmp_path, hardware, **layout).spans["training"]
        for hardware in (h100, h100.model_copy(update={"within_node": narrow}))
    )
    assert after.limit == "sending" and after.seconds["arithmetic"] == before.seconds["arithmetic"]


def test_a_pipeline_idles_less_with_more_microbatches_and_with_interleaving(tmp_path: Path) -> None:
    hardware = load_hardware("h100-80gb")

    def idle(**overrides: Any) -> float:
        span = plan_of(tmp_path, hardware, parallel__pipeline=2, **overrides).spans["training"]
        return span.seconds["idle"] / span.total

    assert idle() < 1 / 16 + 1e-9  # 16 microbatches, one stage to fill
    assert idle(parallel__virtual_pipeline=2) < idle() < idle(training__microbatch_tokens=2048)


def test_spans_name_known_limits(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, load_hardware("cpu-2-cores"))
    assert all(
        span.seconds.keys() == set(LIMITS) or span.seconds.keys() < set(LIMITS)
        for span in plan.spans.values()
    )
    assert plan.seconds == pytest.approx(sum(sum(span.seconds.values()) for span in plan.spans.values()))
