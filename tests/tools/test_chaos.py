"""The kill test at a small size: a run that is killed twice is the undisturbed one, and a run that is not is found."""

import json
import shutil

from safetensors.torch import load_file, save_file

from tools import chaos


def test_two_kills(tmp_path, capsys):
    folder, report = tmp_path / "chaos", tmp_path / "report.json"
    steps = 6
    assert (
        chaos.main(
            [str(folder), "--kills", "2", "--steps", str(steps), "--seed", "4", "--report", str(report)]
        )
        == 0
    ), capsys.readouterr().out
    result = json.loads(report.read_text())
    assert result["kills"] == 2 and not result["wrong"]
    kills = [kill for run in result["runs"] for kill in run["kills"]]
    assert all(kill["left"] == 0 and kill["newest"] <= kill["step"] + 1 for kill in kills)
    assert sum(run["lives"] for run in result["runs"]) == 2 + len(result["runs"])
    assert "every run resumed after every kill" in capsys.readouterr().out

    whole, run = folder / "undisturbed", folder / "run0"
    weights = run / "hf" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] += 1e-6
    save_file(tensors, weights, metadata={"format": "pt"})
    ledger = run / "rollouts" / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join([*lines[:-2], lines[-1], lines[-1]]))
    assert chaos.check(folder / "inputs", run, steps, whole, exact=True) == [
        "the ledger has the steps [1, 2, 3, 4, 6, 6]",
        "step 6 consumed other rollouts than those that were due",
        "the ledger differs from the undisturbed run's",
        "final weights differ: model.norm.weight",
    ]
    shutil.rmtree(folder)
