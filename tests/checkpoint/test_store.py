"""Run checkpoints: resume exactly, at other layouts too; a damaged or unfinished one is never picked up."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_opd.checkpoint import store as store_module
from megatron_opd.checkpoint.checksums import first_damaged_file
from megatron_opd.checkpoint.published import Retention, folder_of_step, published, step_of
from megatron_opd.checkpoint.store import CheckpointStore, sharded_state
from megatron_opd.config.schema import OptimizerConfig
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import read_architecture
from megatron_opd.parallel.groups import ParallelLayout
from tests.training.tiny_run import TinyRun, assert_close, build_run

ONE = ParallelLayout()


def _store(run: TinyRun, models: Path, folder: Path, seed: str = "0") -> CheckpointStore:
    return CheckpointStore(folder, Retention(2), run.groups, models / "student-True", {"seed": seed})


def _save(run: TinyRun, store: CheckpointStore, step: int) -> Path:
    store.save(step, run.student.chunks, run.student.optimizer, {"note": "kept"})
    return store.publish()


def _save_and_go_on(
    layout: ParallelLayout, models: Path, folder: Path, **options: Any
) -> list[dict[str, float]]:
    run = build_run(layout, models, **options)
    run.train(range(2))
    store = _store(run, models, folder)
    store.save(2, run.student.chunks, run.student.optimizer, {"note": "kept"})
    curve = run.train(range(2, 5))  # while it is written: what is saved is what was
    store.publish()
    return curve


def _resume(layout: ParallelLayout, models: Path, folder: Path, **options: Any) -> list[dict[str, float]]:
    run = build_run(layout, models, **options)
    run.train(range(1))  # a state that loading has to replace
    store = _store(run, models, folder)
    found = store.newest_intact()
    assert found is not None
    state = store.load(found, run.student.chunks, run.student.optimizer)
    assert state == {"note": "kept", "step": 2, "identity": {"seed": "0"}}
    run.student.continue_after(state["step"])
    return run.train(range(2, 5))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "plain"])
@pytest.mark.parametrize("layout", [ParallelLayout(data=2), ParallelLayout(tensor=2)], ids=str)
def test_the_same_layout_goes_on_bit_for_bit(gloo, models, tmp_path, layout, distributed, precision):
    """With torch's Adam the distributed optimizer of megatron-core alone resumes wrongly: see
    parallel.torch_adam."""
    options = {
        "optimizer": OptimizerConfig(lr=1e-3, warmup_steps=3, schedule="cosine", distributed=distributed),
        "precision": precision,
    }
    uninterrupted = gloo(2, _save_and_go_on, layout, models, tmp_path, **options)
    resumed = gloo(2, _resume, layout, models, tmp_path, **options)
    assert resumed == uninterrupted


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        (ParallelLayout(tensor=2, pipeline=2), ParallelLayout(data=2)),
        (ParallelLayout(data=2), ParallelLayout(tensor=2, pipeline=2)),
        (ParallelLayout(pipeline=2, data=2), ONE),
        (ParallelLayout(pipeline=2, virtual_pipeline=2), ParallelLayout(tensor=2)),
        (ParallelLayout(data=2), ParallelLayout(pipeline=2, data=2, virtual_pipeline=2)),
    ],
    ids=str,
)
def test_another_layout_goes_on_alike(gloo, models, tmp_path, saved, resumed):
    curve = gloo(saved.world_size, _save_and_go_on, saved, models, tmp_path)[0]
    other = gloo(resumed.world_size, _resume, resumed, models, tmp_path)[0]
    assert_close(other, curve, 1e-5)


def _save_steps(models: Path, folder: Path, steps: list[int]) -> str | None:
    run = build_run(ONE, models)
    store = _store(run, models, folder)
    for step in steps:
        _save(run, store, step)
    found = store.newest_intact()
    return None if found is None else found.name


def test_every_so_many_steps_one_is_kept_for_good(tmp_path):
    for step in range(2, 13, 2):
        folder_of_step(tmp_path, step).mkdir()
        Retention(keep_last=2, keep_every=4).apply(tmp_path)
    assert [step_of(path) for path in published(tmp_path)] == [4, 8, 10, 12]
    Retention(keep_last=1).apply(tmp_path)
    assert [step_of(path) for path in published(tmp_path)] == [12]


def _newest(models: Path, folder: Path) -> str | None:
    return _save_steps(models, folder, [])


def test_keeps_the_newest_and_is_a_model_folder(gloo, models, tmp_path):
    assert gloo(1, _save_steps, models, tmp_path, [1, 2, 3]) == ["step_00000003"]
    assert [path.name for path in published(tmp_path)] == ["step_00000002", "step_00000003"]
    assert (tmp_path / "latest").resolve() == tmp_path / "step_00000003"
    assert read_architecture(tmp_path / "latest").num_layers == 4
    assert not list(tmp_path.glob(".writing*"))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [_flip, _truncate, Path.unlink], ids=["bit flip", "truncation", "missing"])
def test_a_damaged_checkpoint_is_passed_over(gloo, models, tmp_path, damage):
    gloo(1, _save_steps, models, tmp_path, [1, 2])
    newest = tmp_path / "step_00000002"
    victim = max((newest / "state").iterdir(), key=lambda path: path.stat().st_size)
    damage(victim)
    assert first_damaged_file(newest) == f"state/{victim.name}"
    assert gloo(1, _newest, models, tmp_path) == ["step_00000001"]
    assert [path.name for path in published(tmp_path)] == ["step_00000001"]
    assert (tmp_path / "damaged_step_00000002").is_dir(), "set aside, so that it never pushes out a sound one"


def test_with_all_damaged_the_run_is_not_begun_anew(gloo, models, tmp_path):
    gloo(1, _save_steps, models, tmp_path, [1, 2])
    for folder in published(tmp_path):
        _flip(folder / "run.json")
    with pytest.raises(UserError, match=r"no intact checkpoint: step_00000002 \(run.json\), step_00000001"):
        gloo(2, _newest_of_two, models, tmp_path)
    assert len(published(tmp_path)) == 2


def _newest_of_two(models: Path, folder: Path) -> None:
    _store(build_run(ParallelLayout(data=2), models), models, folder).newest_intact()


def _resume_with(models: Path, folder: Path, optimizer: OptimizerConfig, seed: str) -> list[dict[str, Any]]:
    run = build_run(ONE, models, optimizer=optimizer)
    store = _store(run, models, folder, seed)
    found = store.newest_intact()
    assert found is not None
    store.load(found, run.student.chunks, run.student.optimizer)
    run.student.continue_after(2)
    return [
        {key: group[key] for key in ("lr", "betas", "eps")} for group in run.student.optimizer.param_groups
    ]


def test_the_optimizer_settings_of_the_config_win_on_resume(gloo, models, tmp_path):
    gloo(1, _save_and_go_on, ONE, models, tmp_path)
    changed = OptimizerConfig(lr=1e-5, beta1=0.8, beta2=0.7, eps=1e-3)
    groups = gloo(1, _resume_with, models, tmp_path, changed, "0")[0]
    assert groups and all(group == {"lr": 1e-5, "betas": (0.8, 0.7), "eps": 1e-3} for group in groups)


def test_a_checkpoint_of_another_run_is_refused(gloo, models, tmp_path):
    gloo(1, _save_and_go_on, ONE, models, tmp_path)
    with pytest.raises(UserError, match="belongs to a run with seed = 0, this one has 1"):
        gloo(1, _resume_with, models, tmp_path, OptimizerConfig(), "1")


def test_a_checkpoint_from_before_the_optimizer_was_written_down_is_adams(gloo, models, tmp_path):
    gloo(1, _save_and_go_on, ONE, models, tmp_path)
    for name, accepted in (("adam", True), ("sgd", False)):
        refusal = gloo(1, _load_with_optimizer, models, tmp_path, name)[0]
        assert (refusal == "") == accepted
    assert "belongs to a run with optimizer.name = adam, this one has sgd" in refusal


def _load_with_optimizer(models: Path, folder: Path, name: str) -> str:
    run = build_run(ONE, models)
    store = _store(run, models, folder)
    store.identity = {"seed": "0", "optimizer.name": name}
    try:
        store.load(published(folder)[-1], run.student.chunks, run.student.optimizer)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("saved", [True, False])
def test_whole_and_sharded_optimizers_do_not_mix(gloo, models, tmp_path, saved):
    gloo(1, _save_and_go_on, ONE, models, tmp_path, optimizer=OptimizerConfig(distributed=saved))
    other = OptimizerConfig(distributed=not saved)
    expected = (
        f"was saved with {str(saved).lower()}, which this run cannot load: set it to {str(saved).lower()}"
    )
    with pytest.raises(UserError, match=f"optimizer.distributed: .*{expected}$"):
        gloo(1, _resume, ONE, models, tmp_path, optimizer=other)


def _bytes_to_write(layout: ParallelLayout, models: Path) -> int:
    run = build_run(layout, models, optimizer=OptimizerConfig(distributed=False))
    run.train(range(1))
    state = sharded_state(run.student.chunks, run.student.optimizer, run.groups, is_loading=False)
    return store_module._local_bytes(state)


def test_the_space_needed_counts_replicas_once(gloo, models):
    one = sum(gloo(1, _bytes_to_write, ONE, models))
    for layout in (ParallelLayout(data=2), ParallelLayout(tensor=2)):
        assert sum(gloo(2, _bytes_to_write, layout, models)) == pytest.approx(one, rel=1e-3)


def test_a_save_cut_short_is_never_picked_up(gloo, models, tmp_path):
    gloo(1, _save_steps, models, tmp_path, [1])
    shutil.copytree(tmp_path / "step_00000001", tmp_path / ".writing_step_00000002")
    assert gloo(1, _newest, models, tmp_path) == ["step_00000001"]
    assert gloo(1, _save_steps, models, tmp_path, [2]) == ["step_00000002"]
    assert not list(tmp_path.glob(".writing*"))


def _save_on_a_full_disk(models: Path, folder: Path, when: str) -> str:
    run = build_run(ParallelLayout(data=2), models)
    store = _store(run, models, folder)
    _save(run, store, 1)

    def write_and_fail(state: Any, path: str, **options: Any) -> None:
        (Path(path) / "half").write_bytes(b"x" * 100)
        dist.barrier()  # megatron-core too collects what every rank wrote before it raises
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as caught:
        if when == "before":
            patch.setattr(store_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        else:
            patch.setattr(dist_checkpointing, "save", write_and_fail)
        _save(run, store, 2)
    dist.barrier()
    return str(caught.value)


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_full_disk_loses_nothing(gloo, models, tmp_path, when):
    for message in gloo(2, _save_on_a_full_disk, models, tmp_path, when):
        assert "no space left on device" in message
        assert "checkpoints kept: step_00000001" in message
        assert "\n" not in message
    assert [path.name for path in published(tmp_path)] == ["step_00000001"]
    assert first_damaged_file(tmp_path / "step_00000001") is None
    assert not list(tmp_path.glob(".writing*"))
