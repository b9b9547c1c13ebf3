"""`CachedTeacher`: a teacher that is not asked about what it has said before.

Microbatches are taken from the cache whole, and by index: where every data-parallel rank's i-th microbatch is there,
none of them is forwarded. Which they are follows from one all-reduce, so all ranks agree, whatever each has read.

Shapes: R loss positions of a sequence, N of a whole microbatch, n of this rank's share.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_opd.data.packing import Microbatch
from megatron_opd.objectives import LinearLogits, ServedLogprobs
from megatron_opd.parallel.groups import all_ranks
from megatron_opd.teacher.cache import PayloadCache, segments_of
from megatron_opd.teacher.dealing import whole_rows
from megatron_opd.teacher.payload import Awaited, TeacherPayload, tensors_of
from megatron_opd.teacher.teacher import Asked, Teacher
from megatron_opd.teacher.transport import rows_of_share


class CachedTeacher(Teacher):
    """`teacher` behind a cache; `groups` are the student's.

    Evaluations pass it by: their responses are a new student's each time. `multiple` divides the number of microbatches
    that the teacher is asked about.
    """

    def __init__(
        self,
        teacher: Teacher,
        cache: PayloadCache,
        groups: ProcessGroupCollection,
        device: torch.device,
        *,
        multiple: int = 1,
    ) -> None:
        self.teacher, self._cache, self._groups = teacher, cache, groups
        self._device, self._multiple = device, multiple
        self._hits = self._misses = 0
        self.gives_distributions = teacher.gives_distributions

    @property
    def names(self) -> Sequence[str]:
        """As the teacher's."""
        return self.teacher.names

    def score(self, asked: Asked) -> list[TeacherPayload | None]:
        """As the teacher's, of which it asks what is not in the cache.

        Collectives: 1 all-reduce over all ranks of the student, the teacher's `score` unless everything is there, and
        those of `whole_rows` for each payload that comes from it.
        """
        if asked.evaluation:
            return list(self.teacher.score(asked))
        served = self._cache.source.engine != "megatron"  # the others do not read the student's ids
        assert asked.student_ids is None or not served, "refused at start-up: they are other ones every time"
        whole = asked.whole[self._groups.dp.rank()]
        last = self._groups.pp.rank() == self._groups.pp.size() - 1
        payloads = [self._read(microbatch) if last else None for microbatch in whole]
        missing = self._missing([payload is not None or not last for payload in payloads])
        self._count(asked.whole, missing)
        fresh = self.teacher.score(asked.only(missing)) if missing else []
        for i, payload in zip(missing, fresh, strict=True):
            payloads[i] = self._kept(payload, whole[i], asked.microbatches[i])
        return payloads

    def distribution(
        self, payload: TeacherPayload, *, chunked: bool
    ) -> Tensor | LinearLogits | ServedLogprobs:
        """As the teacher's."""
        return self.teacher.distribution(payload, chunked=chunked)

    def described(self) -> str:
        """The teacher's, and where what it says is kept."""
        return "; ".join(
            filter(None, [self.teacher.described(), f"what it says is kept in {self._cache.folder}"])
        )

    def metrics(self) -> dict[str, float]:
        """The teacher's, and how many sequences came from the cache since the last call, and how many from it."""
        counted = {"teacher_cache_hits": self._hits, "teacher_cache_misses": self._misses}
        self._hits = self._misses = 0
        return {**self.teacher.metrics(), **counted}

    def before_save(self, step: int) -> None:
        """As the teacher's."""
        self.teacher.before_save(step)

    def before_publish(self) -> None:
        """As the teacher's."""
        self.teacher.before_publish()

    def finish(self, *, early: bool = False) -> None:
        """As the teacher's."""
        self.teacher.finish(early=early)

    def _missing(self, found: Sequence[bool]) -> list[int]:
        """Indices that some rank has not found, filled up to a multiple with others."""
        everywhere = torch.tensor(found, dtype=torch.int32, device=self._device)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN, group=all_ranks(self._groups))
        hits = everywhere.bool().tolist()
        count = hits.count(False)
        more = -count % self._multiple
        again = [i for i, hit in enumerate(hits) if hit][:more]
        return sorted([i for i, hit in enumerate(hits) if not hit] + again)

    def _count(self, whole: Sequence[Sequence[Microbatch]], missing: Sequence[int]) -> None:
        for rank in whole:
            for i, microbatch in enumerate(rank):
                sequences = sum(1 for _ in segments_of(microbatch))
                if i in missing:
                    self._misses += sequences
                else:
                    self._hits += sequences

    def _read(self, microbatch: Microbatch) -> TeacherPayload | None:
        """This rank's share of a whole microbatch's payload, if all of its sequences are there."""
        form = self._cache.source.form
        parts = [[torch.empty(0, *trailing, dtype=dtype) for trailing, dtype in form.tensors]]
        for segment in segments_of(microbatch.for_teacher):
            rows = self._cache.read(segment)
            if rows is None:
                return None
            parts.append(rows)
        mine_n = rows_of_share(microbatch, self._groups.cp.rank(), self._groups.cp.size())
        return form.payload(
            [torch.cat(tensors)[mine_n].to(self._device) for tensors in zip(*parts, strict=True)]
        )

    def _kept(
        self, payload: TeacherPayload | None, whole: Microbatch, share: Microbatch
    ) -> TeacherPayload | None:
        """The payload; its sequences are written, once it is there. None but on the last stage."""
        if isinstance(payload, Awaited):
            return Awaited(partial(self._arrived, payload, whole, share))
        if payload is not None:
            self._write(payload, whole, share)
        return payload

    def _arrived(self, awaited: Awaited, whole: Microbatch, share: Microbatch) -> TeacherPayload:
        payload = awaited.wait()
        self._write(payload, whole, share)
        return payload

    def _write(self, payload: TeacherPayload, whole: Microbatch, share: Microbatch) -> None:
        """On one rank of those that have parts of the same payload."""
        rows = whole_rows(share, tensors_of(payload), self._groups.cp)
        if self._groups.tp.rank() or self._groups.cp.rank():
            return
        start = 0
        for segment in segments_of(whole.for_teacher):
            end = start + len(segment.positions_R)
            self._cache.write(segment, [tensor[start:end] for tensor in rows])
            start = end
