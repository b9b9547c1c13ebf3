"""The curve: drawn from whatever rows a run has, refused when there are none."""

import math

import pytest
from matplotlib.image import imread

from megatron_opd.errors import UserError
from megatron_opd.report.metrics import MetricsWriter
from megatron_opd.report.plot import plot_curve


def write(run_dir, rows):
    writer = MetricsWriter(run_dir)
    for step, values in rows:
        writer.log(step, values)
    writer.close()


def full_row(step):
    return {"reverse_kl": 2 / step, "grad_norm": 1.0, "rollout_seconds": 1.6, "train_seconds": 1.5}


@pytest.mark.parametrize(
    "rows",
    [
        [
            (0, {"eval/reverse_kl": 2.0}),
            *((s, full_row(s)) for s in range(1, 30)),
            (30, {"eval/reverse_kl": 0.5}),
        ],
        [(0, {"eval/reverse_kl": 2.0})],
        [(1, full_row(1))],
        [(1, {"reverse_kl": 0.0, "grad_norm": 0.0})],
        [
            (1, full_row(1)),
            (2, {"reverse_kl": math.nan, "grad_norm": math.inf, "tokens": 0}),
            (3, full_row(3)),
        ],
        [(1, full_row(1)), (2, {"tokens": 0, "skipped": 1, "rollout_seconds": 1.0})],
        [(0, {"eval/reverse_kl_sampled": 0.5}), (1, {"reverse_kl_sampled": -0.1, "grad_norm": 1.0})],
        [(1, {"topk_divergence": 0.5, "grad_norm": 1.0}), (2, {"topk_divergence": 0.4, "grad_norm": 1.0})],
    ],
    ids=[
        "whole run",
        "evaluation only",
        "one step",
        "zeros",
        "a bad step",
        "a skipped step",
        "an estimate below zero",
        "a support only",
    ],
)
def test_the_picture_is_drawn(tmp_path, rows):
    write(tmp_path, rows)
    path = plot_curve(tmp_path)
    assert path == tmp_path / "curve.png"
    image = imread(path)
    assert image.shape[0] > 500 and image.shape[1] > 800
    assert image[..., :3].std() > 0.02  # not a blank sheet
    assert not list(tmp_path.glob("*.tmp"))


def test_nothing_to_draw(tmp_path):
    write(tmp_path, [(1, {"loss": 1.0})])
    with pytest.raises(UserError, match=r"metrics\.jsonl: holds no reverse_kl"):
        plot_curve(tmp_path)
