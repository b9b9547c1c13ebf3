"""A frozen model whose weights lie in host memory: on its device while it runs, with the same results."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opd.data.packing import pack
from megatron_opd.parallel.groups import ParallelLayout
from megatron_opd.teacher.host_weights import HostWeights
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.teacher.payload import tensors_of
from megatron_opd.teacher.teacher import Asked
from tests.tiny import recorded_rollouts
from tests.training.tiny_run import build_run, save_pair

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_weights_are_copied_to_the_device_inside_and_are_in_host_memory_outside(device):
    layer = torch.nn.Linear(3, 2)
    values = [parameter.detach().clone() for parameter in layer.parameters()]
    weights = HostWeights(layer.to(device).parameters(), torch.device(device))
    host = [parameter.data_ptr() for parameter in layer.parameters()]
    for _ in range(2):
        with weights.on_device():
            for parameter, pointer, value in zip(layer.parameters(), host, values, strict=True):
                assert parameter.device.type == device and parameter.data_ptr() != pointer
                assert torch.equal(parameter.cpu(), value)
        assert [parameter.data_ptr() for parameter in layer.parameters()] == host
    with pytest.raises(RuntimeError, match="stop"), weights.on_device():
        raise RuntimeError("stop")
    for parameter, value in zip(layer.parameters(), values, strict=True):
        assert parameter.device.type == "cpu" and torch.equal(parameter, value)


def scored(layout: ParallelLayout, models: Path) -> dict[str, Any]:
    """Payloads of the same teacher, offloaded and not, and which of its weights moved for scoring."""
    run = build_run(layout, models)
    plain = run.objective.teacher
    assert isinstance(plain, MegatronTeacher)
    asked = Asked(pack(recorded_rollouts(9), dp_size=1, token_budget=96)[0])
    expected = plain.score(asked)
    offloaded = MegatronTeacher(plain.chunks, run.groups, offload=True)
    (model,) = plain.chunks
    outside = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    inside: dict[str, int] = {}
    model.register_forward_pre_hook(
        lambda model, _: inside.update({name: each.data_ptr() for name, each in model.named_parameters()})
    )
    found = offloaded.score(asked)
    after = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    return {
        "same": all(
            ours is theirs
            if ours is None or theirs is None
            else torch.equal(*tensors_of(ours), *tensors_of(theirs))
            for ours, theirs in zip(found, expected, strict=True)
        ),
        "scored": sum(payload is not None for payload in found),
        "back": after == outside,
        "stayed": [name for name in outside if inside[name] == outside[name]],
    }


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(pipeline=2)], ids=str)
def test_the_teacher_scores_alike_and_keeps_only_its_head(gloo, tmp_path, layout):
    save_pair(tmp_path)
    *first, last = gloo(layout.world_size, scored, layout, tmp_path)
    assert last["scored"] > 1 and last["stayed"] == ["output_layer.weight"]
    for rank in (*first, last):
        assert rank["same"] and rank["back"]
    assert all(rank["stayed"] == [] for rank in first)
