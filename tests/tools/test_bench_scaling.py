"""The bench of scaling runs at a small size, and what is sent is what is expected."""

import pytest
import torch

from tests.forked import forking
from tools.bench import scaling


@pytest.mark.skipif(torch.cuda.is_available(), reason="its processes and its expectations are a CPU's")
def test_small_run(capfd, monkeypatch):
    monkeypatch.setattr(scaling, "get_context", lambda _: forking())
    scaling.main(["--smoke"])
    printed = capfd.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    speeds = {row[0]: row for row in rows if len(row) == 9}
    assert list(speeds) == ["1 process", "TP 2, SP", "PP 2, VPP 2", "sequences x 2"]
    for row in speeds.values():
        assert float(row[2]) > 0 and float(row[3]) > 0
        assert float(row[6]) == pytest.approx(float(row[7]), rel=0.1), "memory, times one process's"
    expected = {name: float(row[4]) for name, row in speeds.items()}
    assert expected["1 process"] == 1.0 and 0.9 < expected["sequences x 2"] < 1.0, "attention grows"
    assert 1.5 < expected["PP 2, VPP 2"] < 1.78, (
        "4 microbatches at 2 * 4 / (4 + 1 / 2), and one stage has the head"
    )
    traffic = [row for row in rows if len(row) == 6]
    assert {(row[1], row[2]) for row in traffic} >= {
        ("tp", "reduce_scatter"),
        ("pp", "send"),
        ("embd", "all_reduce"),
    }
    for row in traffic:
        # what is reported by position, 4 kB an update, is not predicted
        assert float(row[4]) == pytest.approx(float(row[5]), rel=0.02, abs=0.005), row
