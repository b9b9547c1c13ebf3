"""The bench of teacher payloads runs at its smallest size, and counts what is really sent."""

import json
from pathlib import Path

import pytest

from tests.gloo_pool import GlooPools
from tests.sglang_server import SGLangServer
from tests.tiny import VOCAB, save_tiny_model
from tools.bench import teacher_payloads
from tools.bench.payload_turns import WAYS, K, measure

HIDDEN = 64  # of the models that the tests' server has
FP32 = 4


def test_small_run(
    gloo: GlooPools,
    sglang: SGLangServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(teacher_payloads, "in_two_processes", lambda work: gloo(2, measure, work)[0])
    save_tiny_model(tmp_path / "student", seed=5)
    written = tmp_path / "found.json"
    models = ("--student", str(tmp_path / "student"), "--teacher", str(sglang.models[0]))
    teacher_payloads.main([*models, "--url", sglang.url, "--smoke", "--json", str(written)])
    lines = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    table = {cells[0]: cells[1:] for cells in ([c.strip() for c in line.split("│")[1:-1]] for line in lines)}
    assert list(table) == [way.name for way in WAYS]
    expected = {
        "hidden_states": FP32 * HIDDEN,
        "logits": FP32 * VOCAB,
        "topk": FP32 * (1 + 2 * K),
        "sampled": FP32,
    }
    assert {name: float(table[name][1]) for name in expected} == expected
    assert {float(table[name][0]) for name in expected} == {float(table["topk"][0])}, "asked alike"
    for name in ("SGLang, topk", "SGLang, sampled"):
        assert float(table[name][1]) > expected[name.removeprefix("SGLang, ")], "HTTP brings no less"
    assert all(float(cell) > 0 for cells in table.values() for cell in cells[3:6])
    (found,) = json.loads(written.read_text()).values()
    assert found["logits"]["loss"] == pytest.approx(found["hidden_states"]["loss"], rel=1e-5)
    assert all(len(found[name]["waited"]) == 1 for name in expected)
