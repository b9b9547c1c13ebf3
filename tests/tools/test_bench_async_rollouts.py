"""The bench of rollouts drawn ahead runs at a small size."""

from tests.data.tiny_tokenizer import save_tokenizer, write_prompts
from tests.forked import run_forked
from tests.sglang_server import SGLangServer
from tests.tiny import save_tiny_model
from tools.bench import async_rollouts


def test_small_run(sglang: SGLangServer, tmp_path) -> None:
    for name, seed in (("student", 1), ("teacher", 2)):
        save_tiny_model(tmp_path / name, seed=seed, tied=False)
        save_tokenizer(tmp_path / name)
    write_prompts(tmp_path / "prompts.jsonl", 12)
    values = {
        "student.path": tmp_path / "student",
        "teacher.path": tmp_path / "teacher",
        "data.prompts": tmp_path / "prompts.jsonl",
        "rollout.max_new_tokens": 16,
        "rollout.sglang.urls": f"[{sglang.url}]",
    }
    overrides = [f"{key}={value}" for key, value in values.items()]
    try:
        done = run_forked("--smoke", *overrides, program=async_rollouts.main)
    finally:
        sglang.load(sglang.models[0], "0")
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line
    ]
    assert [row[0] for row in rows] == ["synchronous", "ahead by 1"]
    assert float(rows[0][-1]) == 0.0 and 0.0 <= float(rows[1][-1]) <= 1.0
    for row in rows:
        assert all(float(seconds) > 0 for seconds in row[1:-1])
    assert "synchronous / ahead = " in done.stdout
