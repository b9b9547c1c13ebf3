"""What the discount of later rewards does to the gradient: the toy study of Revisiting OPD (2603.25562).

Two mirrored tasks on a line: from +2 to -3 and from -2 to +3, in 20 steps s' = s + d with d ~ N(mean, deviation). A
teacher for each task is trained by REINFORCE; one student, which is told the task, learns from both on its own
trajectories, with the rewards log p_teacher(d) - log p_student(d) and the returns and the loss of
`megatron_opd.objectives.policy_gradient`. Measured for every discount: the variance of the gradient over 8 microbatches
of 8 trajectories (output layer), and how far from the goal the student ends.

Shape suffixes: B trajectories, H steps of one (the horizon), N = B * H actions.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.distributions import Normal

from examples.papers.study import Mean
from megatron_opd.objectives.policy_gradient import discounted_returns, policy_gradient

HORIZON, STARTS, GOALS = 20, (2.0, -2.0), (-3.0, 3.0)
DISCOUNTS, SEEDS = (0.0, 0.25, 0.5, 0.75, 1.0), (42, 43, 2026)
TRAJECTORIES, MICROBATCHES = 64, 8
WIDTH = 60  # about 4,000 parameters
SMALLEST_DEVIATION = (
    0.1  # of an action; without a bound the log-probs of a teacher that has converged diverge
)


class Policy(nn.Module):
    """(task, position, time / horizon) -> the distribution of the next step."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, task: int, position_B: Tensor, time_B: Tensor) -> Normal:
        """The distribution for every position."""
        told_B3 = torch.stack(
            [torch.full_like(position_B, float(task)), position_B / 3, time_B / HORIZON], -1
        )
        mean_B, raw_B = self.head(self.body(told_B3)).unbind(-1)
        return Normal(mean_B, nn.functional.softplus(raw_B) + SMALLEST_DEVIATION)


@torch.no_grad()
def roll_out(policy: Policy, task: int, trajectories: int) -> tuple[Tensor, Tensor]:
    """Positions [B, H + 1] and steps [B, H] of `trajectories` walks."""
    position_B = torch.full((trajectories,), STARTS[task])
    positions, steps = [position_B], []
    for time in range(HORIZON):
        steps.append(policy(task, position_B, torch.full_like(position_B, time)).sample())
        position_B = position_B + steps[-1]
        positions.append(position_B)
    return torch.stack(positions, 1), torch.stack(steps, 1)


def logprobs(policy: Policy, task: int, positions_BH1: Tensor, steps_BH: Tensor) -> Tensor:
    """Log-densities [B, H] of the steps, differentiable in the policy."""
    time_BH = torch.arange(HORIZON, dtype=torch.float32).expand_as(steps_BH)
    return policy(task, positions_BH1[:, :-1], time_BH).log_prob(steps_BH)


def loss_of(logprob_BH: Tensor, reward_BH: Tensor, discount: float) -> Tensor:
    """Our own returns and surrogate loss, a mean over the actions."""
    trajectories = len(logprob_BH)
    reward_N, mask_N = reward_BH.flatten(), torch.ones(reward_BH.numel(), dtype=torch.bool)
    ends = torch.arange(trajectories + 1) * HORIZON
    return_N = discounted_returns(reward_N, mask_N, ends, discount=discount)
    return policy_gradient(logprob_BH.flatten(), return_N).loss_N.mean()


def train_teacher(task: int, iterations: int) -> Policy:
    """REINFORCE with the reward to go, less its mean over the trajectories, of minus the distance to the goal."""
    torch.manual_seed(task)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(iterations):
        positions, steps = roll_out(policy, task, 256)
        reward_BH = -(positions[:, 1:] - GOALS[task]).abs()
        to_go_BH = reward_BH.flip(1).cumsum(1).flip(1)
        advantage_BH = (to_go_BH - to_go_BH.mean(0)) / (to_go_BH.std(0) + 1e-6)
        loss = -(advantage_BH * logprobs(policy, task, positions, steps)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return policy.requires_grad_(False)


def student_loss(student: Policy, teacher: Policy, task: int, discount: float, trajectories: int) -> Tensor:
    """The loss on fresh walks of the student."""
    positions, steps = roll_out(student, task, trajectories)
    logprob_BH = logprobs(student, task, positions, steps)
    reward_BH = logprobs(teacher, task, positions, steps) - logprob_BH.detach()
    return loss_of(logprob_BH, reward_BH, discount)


def gradient_variance(student: Policy, teachers: list[Policy], task: int, discount: float) -> float:
    """(1/M) sum_m |g_m - mean g|^2 over microbatches, of the gradient of the output layer."""
    gradients = []
    for _ in range(MICROBATCHES):
        loss = student_loss(student, teachers[task], task, discount, TRAJECTORIES // MICROBATCHES)
        weight, bias = torch.autograd.grad(loss, list(student.head.parameters()))
        gradients.append(torch.cat([weight.flatten(), bias]))
    stacked = torch.stack(gradients)
    return float((stacked - stacked.mean(0)).square().sum(1).mean())


@dataclass(frozen=True)
class Student:
    """What was measured of one student: the gradient's variance every 20 iterations; by task, how far from the goal it
    ends, and how often it is where at what time [H + 1, bins]."""

    variance: list[float]
    distance: list[float]
    visits: list[np.ndarray]


def distil(teachers: list[Policy], discount: float, seed: int, iterations: int) -> Student:
    """Train one student, on the tasks in turns."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    student = Policy()
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    variances = []
    for iteration in range(iterations):
        task = iteration % 2
        if iteration % 20 < 2:
            variances.append(gradient_variance(student, teachers, task, discount))
        loss = student_loss(student, teachers[task], task, discount, TRAJECTORIES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    walks = [roll_out(student, task, 500)[0] for task in (0, 1)]
    return Student(
        variance=[float(np.mean(variances[at : at + 2])) for at in range(0, len(variances), 2)],
        distance=[float((walk[:, -1] - goal).abs().mean()) for walk, goal in zip(walks, GOALS, strict=True)],
        visits=[
            np.stack([np.histogram(walk[:, time], bins=48, range=(-6, 6))[0] for time in range(HORIZON + 1)])
            for walk in walks
        ],
    )


def draw(runs: Mapping[float, Sequence[Student]], file: Path) -> None:
    """Variance over the iterations for every discount; where the students of the first seed go."""
    figure = Figure(figsize=(4 + 2.1 * len(runs), 3.4), layout="constrained")
    axes = figure.subplots(1, 1 + len(runs))
    for discount, each in runs.items():
        curves = np.log10(np.array([run.variance for run in each]))
        mean, spread = curves.mean(0), curves.std(0)
        at = np.arange(len(mean)) * 20
        axes[0].plot(at, 10**mean, label=f"{discount:g}")
        axes[0].fill_between(at, 10 ** (mean - spread), 10 ** (mean + spread), alpha=0.2)
    axes[0].set(yscale="log", xlabel="iteration", title="gradient variance, by discount")
    axes[0].legend(fontsize=7)
    for panel, (discount, each) in zip(axes[1:], runs.items(), strict=True):
        visits = np.sum(each[0].visits, axis=0).T
        panel.imshow(visits, origin="lower", aspect="auto", extent=(0, HORIZON, -6, 6), cmap="magma")
        for goal in GOALS:
            panel.axhline(goal, color="white", linewidth=0.6, linestyle=":")
        panel.set(title=f"visits, discount {discount:g}", xlabel="step", ylim=(-6, 6))
    figure.savefig(file, dpi=130)


def main() -> int:
    """Train, measure, print a table, write `discount.json` and `discount.png`; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few iterations of one seed")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/papers"),
        help="the results go to its subfolder discount, or smoke/discount (default: %(default)s)",
    )
    arguments = parser.parse_args()
    folder = arguments.folder / ("smoke/discount" if arguments.smoke else "discount")
    iterations, seeds = (40, SEEDS[:1]) if arguments.smoke else (2000, SEEDS)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        with multiprocessing.get_context("spawn").Pool(os.cpu_count(), initializer=_unasked) as pool:
            teachers = pool.starmap(
                train_teacher, [(task, 30 if arguments.smoke else 1500) for task in (0, 1)]
            )
            settings = [(teachers, discount, seed, iterations) for discount in DISCOUNTS for seed in seeds]
            done = [pool.apply_async(distil, setting) for setting in settings]
            students = [each.get() for each in track(done, description="students")]
    except KeyboardInterrupt:
        print("interrupted: nothing is kept", file=sys.stderr)
        return 130
    runs: dict[float, list[Student]] = {discount: [] for discount in DISCOUNTS}
    for (_, discount, *_), student in zip(settings, students, strict=True):
        runs[discount].append(student)
    folder.mkdir(parents=True, exist_ok=True)
    show(runs, teachers)
    results = {
        str(discount): [{"variance": run.variance, "distance": run.distance} for run in each]
        for discount, each in runs.items()
    }
    (folder / "discount.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(runs, folder / "discount.png")
    return 0


def _unasked() -> None:
    """Leaves Ctrl-C to the process that is asked for the results."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def show(runs: Mapping[float, Sequence[Student]], teachers: list[Policy]) -> None:
    """The table: gradient variance and distances at the end, mean and standard error over the seeds."""
    table = Table("discount", "gradient variance, median", "distance from goal, left", "right")
    for discount, each in runs.items():
        medians = np.array([np.median(run.variance) for run in each])
        left, right = np.array([run.distance for run in each]).T
        table.add_row(f"{discount:g}", *(_with_error(values) for values in (medians, left, right)))
    ends = [f"{(roll_out(teachers[t], t, 500)[0][:, -1] - GOALS[t]).abs().mean():.3g}" for t in (0, 1)]
    table.add_row("teachers", "", *ends)
    Console().print(table)


def _with_error(values: np.ndarray) -> str:
    mean = Mean.of(values.tolist())
    return f"{mean.mean:.3g} ± {mean.error:.2g}"


if __name__ == "__main__":
    sys.exit(main())
