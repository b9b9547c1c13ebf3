"""A checkpoint that a run has written, with the optimizer beside the model."""

from pathlib import Path

import pytest

from megatron_opd.checkpoint.published import Retention
from megatron_opd.checkpoint.store import CheckpointStore
from megatron_opd.parallel.groups import ParallelLayout
from tests.training.tiny_run import build_run, save_pair


def _train_and_save(folder: Path) -> Path:
    run = build_run(ParallelLayout(tensor=2), folder)
    run.train(range(1))
    store = CheckpointStore(folder / "run", Retention(1), run.groups, folder / "student-True", {})
    store.save(1, run.student.chunks, run.student.optimizer, {})
    return store.publish()


@pytest.fixture(scope="session")
def run_checkpoint(gloo, tmp_path_factory) -> Path:
    """Written after a step at TP 2; the model it was trained from is `student-True` in the run's parent folder."""
    folder = tmp_path_factory.mktemp("run")
    save_pair(folder)
    return gloo(2, _train_and_save, folder)[0]
