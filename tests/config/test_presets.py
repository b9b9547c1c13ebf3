"""Every preset's loss and gradient, pinned to numbers computed with the float64 reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_opd.config.load import load_config
from megatron_opd.config.presets import PRESETS
from megatron_opd.objectives import Objective, reference
from megatron_opd.preflight import build_objective

# preset -> loss, Euclidean norm of the gradient, its entry at token 4 and id 7
PINNED: dict[str, tuple[float, float, float]] = {
    "opd": (0.0169016074665, 4.30348876555, -0.0092179041989),
    "iw-opd": (-0.571979593967, 5.66310361912, -0.0105649967125),
    "iw-opd-exact": (6.06004891404, 0.614228814387, -0.0123301824416),
    "lsm": (3.26966485346, 0.462492413331, -0.0118114591553),
    "aopd": (-3.19666407617, 3.47867192726, -0.0239462080711),
    "gkd": (0.991385853675, 0.0821822871101, -0.00313446987021),
    "eopd": (4.13540537553, 4.38831290193, -0.0312918481658),
    "exopd": (0.525987283467, 5.2850576756, -0.0121106181739),
    "mopd": (4.51494486693, 0.461835835541, -0.010714628971),
    "minillm": (7.1709954451, 2.35216024992, -0.0107580194859),
    "poweropd": (-4.30667350423e-07, 4.97218920114e-07, -2.72049553561e-10),
}
CU_SEQLENS = torch.tensor([0, 5, 12])
MASK = torch.tensor([False, True, True, True, True, False, False, True, True, False, True, True])
VOCAB = 80


def inputs() -> dict[str, Tensor]:
    """Logits [12, 80] without a random generator, so that the numbers hold for every version of one."""
    grid = torch.arange(12 * VOCAB, dtype=torch.float64).view(12, VOCAB)
    student, teacher = 3 * torch.sin(1.7 * grid), 3 * torch.sin(1.7 * grid + torch.cos(0.3 * grid))
    targets = (torch.arange(12) * 7) % VOCAB
    logprob = torch.log_softmax(student, 1).gather(1, targets[:, None])[:, 0]
    wave = torch.sin(torch.arange(12, dtype=torch.float64))
    return {
        "student": student,
        "teacher": teacher,
        "targets": targets,
        "rollout": logprob + 0.1 * wave,
        "old": logprob - 0.2 * wave,
        "reference": logprob + wave.flip(0),
    }


def objective_of(preset: str, folder: Path) -> Objective:
    path = folder / "config.yaml"
    more = "reference: {path: c}\n" if preset == "exopd" else ""
    path.write_text(
        "run_dir: run\nstudent: {path: a}\nteacher: {path: b}\ndata: {prompts: p}\n"
        f"{more}objective: {{preset: {preset}}}\n"
    )
    return build_objective(load_config(path))


def loss_of(objective: Objective, student: Tensor, values: dict[str, Tensor], dense: bool) -> Tensor:
    if dense:
        return reference.loss(
            objective,
            student,
            values["teacher"],
            values["targets"],
            MASK,
            CU_SEQLENS,
            rollout_logprob=values["rollout"],
            old_logprob=values["old"],
            reference_logprob=values["reference"],
        )
    stats = objective.token_stats(
        student, values["teacher"], values["targets"], rollout_logprob_N=values["rollout"]
    )
    return objective.loss(
        stats,
        torch.arange(12),
        MASK,
        CU_SEQLENS,
        rollout_logprob_N=values["rollout"],
        old_logprob_N=values["old"],
        reference_logprob_N=values["reference"],
    )[0]


@pytest.mark.parametrize("dense", [True, False], ids=["reference", "sharded"])
@pytest.mark.parametrize("preset", PRESETS)
def test_loss_and_gradient(preset: str, dense: bool, tmp_path: Path) -> None:
    objective = objective_of(preset, tmp_path)
    values = inputs()
    student = values["student"].clone().requires_grad_()
    loss = loss_of(objective, student, values, dense)
    (gradient,) = torch.autograd.grad(loss, student)
    found = (loss.item(), gradient.norm().item(), gradient[4, 7].item())
    assert found == pytest.approx(PINNED[preset], rel=1e-9)
