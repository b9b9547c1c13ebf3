"""What a cache says of itself: totals of a folder, and every token of a file."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_opd.cli import main
from megatron_opd.teacher.cache import PayloadCache, Segment, Source
from megatron_opd.teacher.payload import PayloadFormat
from tests.data.tiny_tokenizer import save_tokenizer

SEGMENT = Segment(torch.tensor([3, 4, 5]), torch.tensor([1, 2]), torch.tensor([5, 6]))
TOPK = PayloadFormat("topk", 8, 40, torch.float32, k=2)
ROWS = [
    torch.tensor([-0.5, -1.5]),
    torch.tensor([[9, 5], [7, 8]]),
    torch.tensor([[-2.0, -0.5], [-1.0, -3.0]]),
]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["teacher-cache", *arguments])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def keep(folder: Path, form: PayloadFormat, rows: list[torch.Tensor]) -> Path:
    PayloadCache(folder, Source("f" * 64, "megatron", form), max_bytes=1e9).write(SEGMENT, rows)
    return max(folder.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


def test_a_folder_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = keep(tmp_path, TOPK, ROWS)
    keep(tmp_path, replace(TOPK, kind="sampled"), ROWS[:1])
    code, out, _ = said(capsys, str(tmp_path))
    assert code == 0 and "2 sequences" in out.splitlines()[0]
    assert any(
        "teacher ffffffffffff megatron topk float32 k 2 temperature 1.0: 1" in line
        for line in out.splitlines()
    )
    code, out, _ = said(capsys, str(path))
    lines = out.splitlines()
    assert code == 0 and lines[1].split() == ["3", "4", "5"]
    assert lines[3].split() == ["2", "'5", "'", "-0.500", "'5", "'", "-0.500,", "'9", "'", "-2.000"], (
        "likeliest first"
    )
    save_tokenizer(tmp_path / "model")
    code, out, _ = said(capsys, str(path), "--tokenizer", str(tmp_path / "model"))
    assert code == 0 and "'5 '" not in out


def test_logits_and_hidden_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    _, out, _ = said(capsys, str(keep(tmp_path, replace(TOPK, kind="logits"), [logits])))
    expected = logits.log_softmax(-1)[0]
    assert f"{expected[5]:.3f}" in out and f"'{int(expected.argmax())} ' {expected.max():.3f}" in out
    code, out, _ = said(capsys, str(keep(tmp_path, replace(TOPK, kind="hidden_states"), [torch.zeros(2, 8)])))
    assert code == 0 and "with teacher.payload topk it is here" in out


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "none"):
        code, _, err = said(capsys, str(path))
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    path = keep(tmp_path, TOPK, ROWS)
    path.write_bytes(b"\xff" * 64)
    assert said(capsys, str(path))[0] == 2
    assert "  damaged: 1 sequences" in said(capsys, str(tmp_path))[1]
