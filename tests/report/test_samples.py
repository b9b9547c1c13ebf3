"""The samples of a run: those of its lineage, and beside them what a resumed run has drawn anew."""

from pathlib import Path

from megatron_opd.data.rollouts import Rollout, read_rollouts
from megatron_opd.report.samples import SAMPLES, set_samples_aside, write_samples


def draw(run_dir: Path, steps: range, *, life: int) -> None:
    for step in steps:
        rollouts = [Rollout(f"{step}@0", i, [1], [life], [-0.5], "length", 0) for i in range(SAMPLES + 2)]
        write_samples(run_dir, step, rollouts, decode=str)


def lives(folder: Path) -> dict[str, int]:
    return {path.name: read_rollouts(path)[0].response_ids[0] for path in sorted(folder.glob("*.jsonl"))}


def test_the_first_of_a_step_are_kept(tmp_path: Path) -> None:
    draw(tmp_path, range(1, 2), life=0)
    kept = read_rollouts(tmp_path / "rollouts" / "step_00000001.jsonl")
    assert [rollout.sample for rollout in kept] == list(range(SAMPLES))


def test_what_is_drawn_again_is_set_aside_every_time(tmp_path: Path) -> None:
    set_samples_aside(tmp_path, 0)  # a run that starts has none
    draw(tmp_path, range(1, 5), life=0)
    for life, last_kept in enumerate((2, 1), start=1):
        set_samples_aside(tmp_path, last_kept)
        draw(tmp_path, range(last_kept + 1, 4), life=life)
    assert lives(tmp_path / "rollouts") == {
        "step_00000001.jsonl": 0,
        "step_00000002.jsonl": 2,
        "step_00000003.jsonl": 2,
    }
    assert lives(tmp_path / "rollouts" / "discarded") == {
        "step_00000002.0.jsonl": 0,
        "step_00000003.0.jsonl": 0,
        "step_00000003.1.jsonl": 1,
        "step_00000004.0.jsonl": 0,
    }
