"""The bench of the objectives runs at a small size, and its straightforward implementations agree with ours."""

import pytest
import torch

from tools.bench import objectives
from tools.bench.measure import alternate, median_ratio, peak_extra

SMALL = ["--tokens", "12", "--vocab", "64", "--hidden", "8", "--chunk", "4", "--k", "4", "--positions", "64"]
SMALL += ["--repeats", "1", "--threads", "1"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes one rank")
def test_all_sections_run(capfd):
    objectives.main([*SMALL, "--tp", "2"])
    printed = capfd.readouterr().out
    for expected in (
        "64 ids on 2 ranks, fp32",
        "64 ids on 2 ranks, bf16",
        "gathered logits, 2",
        "from hidden states [12, 8], 64 ids, chunks of 4, bf16",
        "its six products",
        "peak memory of linear_divergence",
        "top-4 reverse KL",
        "token_weights, unit_mean",
    ):
        assert expected in printed, expected


def test_implementations_that_disagree_are_refused(monkeypatch):
    right = objectives.straightforward.gathered_reverse_kl

    def wrong(*arguments):
        divergence, gradient = right(*arguments)
        return divergence, 1.01 * gradient

    monkeypatch.setattr(objectives.straightforward, "gathered_reverse_kl", wrong)
    with pytest.raises(SystemExit, match="gathered logits, 2 differs from ours"):
        objectives.main([*SMALL, "--tp", "1", "--only", "reverse_kl", "--precision", "fp32"])


def test_peak_counts_temporaries_but_neither_arguments_nor_what_is_returned():
    values = torch.zeros(1000)

    def call():
        temporary = values.double()  # 8000 bytes
        returned = temporary.float().neg()  # 4000 temporary, 4000 returned
        del temporary
        return returned, values

    assert peak_extra(call) == 12000


def test_runs_alternate_and_the_first_round_does_not_count():
    order = []
    seconds = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2)
    assert order == ["a", "b"] * 3
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2}


def test_median_ratio_is_taken_round_by_round():
    assert median_ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0
