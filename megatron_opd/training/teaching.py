"""The servers of a run whose teacher is behind SGLang: started with it, checked before the first step, and ended."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch.distributed as dist

from megatron_opd.checkpoint.folders import alike
from megatron_opd.data.rollouts import Rollout
from megatron_opd.rollout.servers import Servers
from megatron_opd.teacher.cached import CachedTeacher
from megatron_opd.teacher.contract import check_contract
from megatron_opd.teacher.sglang import SGLangTeacher
from megatron_opd.training.job import Job
from megatron_opd.training.serving import client_options, teacher_longest, teacher_server_settings

SELF_TEST_TOKENS = 16


@contextmanager
def teaching(job: Job, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, the teacher can score. A Megatron teacher always can.

    Servers are started, on rank 0, or taken as they are; they have to serve the model of teacher.path, and score a
    short sequence on the way that the run's take. At the end, and after any error, those that the run has started are
    ended. `say` prints a line. Collective over WORLD; raises UserError on every rank alike.
    """
    teacher = job.teacher.teacher if isinstance(job.teacher, CachedTeacher) else job.teacher
    if not isinstance(teacher, SGLangTeacher):
        yield
        return
    config = job.config.teacher.sglang
    servers = None
    try:
        where: list[tuple[list[str], str | None]] = [(config.urls, os.environ.get("SGLANG_API_KEY"))]
        with alike(dist.group.WORLD):
            if not config.urls and dist.get_rank() == 0:
                settings = teacher_server_settings(job.config)
                folder = job.config.run_dir / "servers" / "teacher"
                servers = Servers(settings, folder, lambda line: say(f"teacher: {line}"))
                servers.start(job.config.teacher.folder, "teacher")
                where = [(servers.urls, servers.api_key)]
        dist.broadcast_object_list(where, src=0)
        urls, key = where[0]
        if teacher.asks:
            teacher.connect(
                urls,
                api_key=key,
                first=job.groups.dp.rank(),
                key="teacher.sglang",
                **client_options(config),
            )
        check(job, teacher)
        yield
    finally:
        teacher.close()
        if servers is not None:
            servers.stop()


def check(job: Job, teacher: SGLangTeacher) -> None:
    """The contract with the servers, and a self-test: every replica has the first prompt scored.

    Collective over WORLD. Raises UserError on every rank alike.
    """
    assert job.served is not None
    with alike(dist.group.WORLD):
        if teacher.asks:
            check_contract(teacher.ask_all, job.served, teacher_longest(job.config))
    ids = job.texts.training.prompts[0].token_ids[: SELF_TEST_TOKENS - 1]
    sample = Rollout("self-test", 0, ids, ids[:1], [0.0], "length", 0)
    replace(job, teacher=teacher).teacher_payloads(job.packed([sample] * job.layout.data))
