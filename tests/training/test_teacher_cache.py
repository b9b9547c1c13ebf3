"""A teacher behind a cache: what it takes from files is, bit for bit, what the teacher has said, in any layout."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_opd.config.schema import Config, TeacherConfig
from megatron_opd.teacher import sglang as scoring
from megatron_opd.teacher.cached import CachedTeacher
from megatron_opd.train import train_step
from megatron_opd.training.models import engine_of
from megatron_opd.training.teaching import teaching
from tests.data.tiny_tokenizer import write_prompts
from tests.gloo_pool import GlooPools
from tests.sglang_server import SGLangServer
from tests.tiny import recorded_rollouts, save_tiny_model, with_teacher_prompts
from tests.training import test_several_teachers as several
from tests.training.test_job import build, save_job_models
from tests.training.test_own_layout import OWN, VPP2, Case, observe

SEQUENCES = 9  # of an update
PRIVILEGED = with_teacher_prompts(recorded_rollouts(SEQUENCES))
Observed = tuple[dict[str, float], dict[str, torch.Tensor]] | None


@dataclass(frozen=True)
class Cached(Case):
    """With a cache in this folder."""

    cache: Path | None = None

    def config(self, folder: Path) -> Config:
        config = super().config(folder)
        return config.model_copy(update={"teacher": config.teacher.model_copy(update={"cache": self.cache})})


@contextmanager
def counted() -> Iterator[list[tuple[float, float]]]:
    """(hits, misses) of each run that ends inside."""
    counts: list[tuple[float, float]] = []
    finish = CachedTeacher.finish

    def ending(self: CachedTeacher) -> None:
        metrics = self.metrics()
        counts.append((metrics["teacher_cache_hits"], metrics["teacher_cache_misses"]))
        finish(self)

    with mock.patch.object(CachedTeacher, "finish", ending):
        yield counts


def four_runs(case: Cached, folder: Path) -> tuple[list[Observed], list[tuple[float, float]]]:
    """Without a cache, with an empty one, with a full one, and with one that has a damaged file."""
    with counted() as counts:
        found = [observe(replace(case, cache=None), folder), observe(case, folder), observe(case, folder)]
        if dist.get_rank() == 0:
            assert case.cache is not None
            damaged = min(case.cache.rglob("*.safetensors"))
            damaged.write_bytes(damaged.read_bytes()[:-1])
        dist.barrier()
        found.append(observe(case, folder))
    return found, counts


CASES = [
    Cached(1, {}, None, "topk", head_chunk=7),
    Cached(2, {"tensor": 2, "sequence_parallel": True}, None, rollouts=PRIVILEGED),
    Cached(2, {"context": 2}, None, "topk"),
    Cached(2, {"context": 2}, None, rollouts=PRIVILEGED),
    Cached(2, VPP2, None, "sampled"),
    Cached(2, {"data": 2}, {"context": 2}, "logits"),
    Cached(3, {"context": 2}, OWN),
    Cached(2, {"pipeline": 2}, None, full=True),
    Cached(4, {"tensor": 2, "data": 2}, None, "topk", full=True),
    Cached(4, {"pipeline": 2, "context": 2}, {"tensor": 2, "pipeline": 2}, full=True),
    Cached(3, {"data": 2}, OWN, "sampled", full=True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "student", seed=1, vocab=300)
    for name, seed in (("teacher", 2), ("teacher-a", 2), ("teacher-b", 3)):
        save_tiny_model(folder / name, seed=seed, hidden=96, tied=False, vocab=310)
    return folder


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=[pytest.mark.full] if case.full else []) for case in CASES],
)
def test_the_same_loss_and_gradients_bit_for_bit(
    gloo: GlooPools, folder: Path, tmp_path: Path, case: Cached
) -> None:
    ranks = gloo(case.processes, four_runs, replace(case, cache=tmp_path / "cache"), folder)
    students = [(found, counts) for found, counts in ranks if found[0] is not None]
    assert len(students) == case.processes - case.separate
    for (expected, *others), (empty, full, partly) in students:
        for sums, gradients in others:
            assert sums == expected[0]
            for name, gradient in expected[1].items():
                assert torch.equal(gradients[name], gradient), name
        assert empty == (0, SEQUENCES) and full == (SEQUENCES, 0)
        assert sum(partly) == SEQUENCES and min(partly) > 0
    assert len(list((tmp_path / "cache").rglob("*"))) >= SEQUENCES


def several_twice(case: several.Case, folder: Path) -> list[Any]:
    return [several.observe(case, folder, several.rollouts_of("a", "b"))[:2] for _ in range(2)]


def test_every_one_of_several_teachers_has_files_of_its_own(
    gloo: GlooPools, folder: Path, tmp_path: Path
) -> None:
    """Of mixed teachers both say something of every sequence."""
    teacher = {"paths": several.BOTH, "weights": {"a": 1.0, "b": 3.0}, "cache": str(tmp_path / "cache")}
    first, second = gloo(1, several_twice, several.Case(teacher), folder)[0]
    assert first[0] == second[0]
    assert all(torch.equal(second[1][name], gradient) for name, gradient in first[1].items())
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2 * SEQUENCES


def two_epochs(inputs: Path, run_dir: Path, **changes: Any) -> list[dict[str, float]]:
    """Steps of a student that writes the same responses again: it takes the likeliest ids, and hardly moves."""
    job = build(
        inputs,
        run_dir,
        rollout__top_k=1,
        optimizer__lr=1e-12,
        training__steps=6,
        training__updates_per_rollout=2,
        evaluation__prompts="null",
        **changes,
    )
    assert f"teacher: what it says is kept in {job.config.teacher.cache}" in job.notes(0)
    with teaching(job, lambda _: None):
        return [train_step(job, step)[0] for step in range(1, 7)]


def test_the_second_epoch_and_the_second_run_ask_no_teacher(gloo: GlooPools, tmp_path: Path) -> None:
    save_job_models(tmp_path)
    write_prompts(tmp_path / "prompts.jsonl", 12)
    kept: dict[str, Any] = {"teacher__cache": tmp_path / "cache"}
    rows, again = (gloo(1, two_epochs, tmp_path, tmp_path / name, **kept)[0] for name in ("one", "two"))
    counts = [(row["teacher_cache_hits"], row["teacher_cache_misses"]) for row in rows]
    assert counts == [(0, 4)] * 3 + [(4, 0)] * 3
    assert [row["teacher_cache_hits"] for row in again] == [4] * 6
    for row, repeated in zip(rows, again, strict=True):
        assert row["reverse_kl"] == repeated["reverse_kl"] and row["grad_norm"] == repeated["grad_norm"]
    other = shutil.copytree(tmp_path / "teacher", tmp_path / "other")
    save_tiny_model(other, seed=3, hidden=96, tied=False)
    rows = gloo(1, two_epochs, tmp_path, tmp_path / "three", **kept, teacher__path=other)[0]
    assert [row["teacher_cache_hits"] for row in rows] == [0] * 3 + [4] * 3, "another teacher"


def student_topk(inputs: Path, run_dir: Path, **changes: Any) -> list[dict[str, float]]:
    support: dict[str, Any] = {"objective__support": "student_topk", "objective__remainder": "renormalize"}
    return two_epochs(inputs, run_dir, objective__k=4, **support, **changes)


def test_a_megatron_teacher_does_not_read_the_ids_of_the_student(gloo: GlooPools, tmp_path: Path) -> None:
    """Whichever they are: its payload is the same, and used again."""
    save_job_models(tmp_path)
    write_prompts(tmp_path / "prompts.jsonl", 12)
    rows = gloo(1, student_topk, tmp_path, tmp_path / "run", teacher__cache=tmp_path / "cache")[0]
    assert [(row["teacher_cache_hits"], row["teacher_cache_misses"]) for row in rows] == [(0, 4)] * 3 + [
        (4, 0)
    ] * 3


def test_servers_started_otherwise_are_another_source() -> None:
    def engine(**settings: Any) -> str:
        return engine_of(TeacherConfig.model_validate({"path": "model", **settings}))

    plain, fp8, other = (
        engine(engine="sglang", sglang={"python": "python", "arguments": arguments})
        for arguments in ([], ["--quantization", "fp8"], ["--quantization fp8"])
    )
    assert len({engine(), plain, fp8, other}) == 4 and (engine(), plain) == ("megatron", "sglang")


def served_epochs(inputs: Path, run_dir: Path, url: str, cache: Path) -> list[dict[str, float]]:
    """The same with a teacher at a server, which is asked for nothing but the self-test where all is there."""
    changes = {"teacher__engine": "sglang", "teacher__sglang__urls": f"[{url}]", "teacher__cache": cache}
    with mock.patch.object(scoring, "score_body", wraps=scoring.score_body) as asked:
        rows = two_epochs(inputs, run_dir, objective__preset="lsm", **changes)
    return [*rows, {"asked": asked.call_count}]


def test_servers_are_not_asked_again(gloo: GlooPools, sglang: SGLangServer, tmp_path: Path) -> None:
    for name, model in (("teacher", 0), ("student", 1)):
        sglang.link(model, tmp_path / name)
    write_prompts(tmp_path / "prompts.jsonl", 12)
    first, second = (
        gloo(1, served_epochs, tmp_path, tmp_path / name, sglang.url, tmp_path / "cache")[0]
        for name in ("one", "two")
    )
    assert [row["teacher_cache_hits"] for row in first[:-1]] == [0] * 3 + [4] * 3
    assert (first[-1]["asked"], second[-1]["asked"]) == (13, 1), "12 sequences and the self-test"
    for row, repeated in zip(first[:-1], second[:-1], strict=True):
        assert row["topk_divergence"] == repeated["topk_divergence"]
