"""Config -> the objects of a run, in the order in which mistakes are cheapest to find.

Configuration and files are checked first, then process groups are made, then weights are read.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_opd.checkpoint.folders import hold
from megatron_opd.checkpoint.published import Retention
from megatron_opd.checkpoint.store import CheckpointStore
from megatron_opd.config.layout_checks import alignment_of_run
from megatron_opd.config.schema import Config
from megatron_opd.data.loss_mask import LossMask
from megatron_opd.data.packing import Microbatch, pack
from megatron_opd.data.prompts import Prompt, PromptStream
from megatron_opd.data.rollouts import Rollout
from megatron_opd.data.routes import pack_by_route, routes_digest
from megatron_opd.evaluation.tasks import read_tasks
from megatron_opd.models.architecture import Architecture, ServedModel
from megatron_opd.models.attention import uses_transformer_engine
from megatron_opd.models.gpt import DTYPES, GPT
from megatron_opd.objectives import Objective
from megatron_opd.parallel import cpu
from megatron_opd.parallel.groups import ParallelLayout, build_groups
from megatron_opd.preflight import Checked, check_before_start, check_offload
from megatron_opd.report.samples import SAMPLES
from megatron_opd.rollout.local import LocalEngine
from megatron_opd.rollout.sampling import Sampling
from megatron_opd.rollout.sglang import SGLangEngine
from megatron_opd.rollout.sharded import RolloutEngine, generate_sharded, never
from megatron_opd.rollout.stream import RolloutStream
from megatron_opd.teacher.megatron import MegatronTeacher
from megatron_opd.teacher.payload import TeacherPayload
from megatron_opd.teacher.teacher import Asked, Teacher
from megatron_opd.training.average import WeightAverage
from megatron_opd.training.models import load_models
from megatron_opd.training.per_teacher import per_teacher
from megatron_opd.training.relay import Relay, layout_of
from megatron_opd.training.score import likeliest_ids, sampled_logprobs
from megatron_opd.training.student import Student, build_student
from megatron_opd.training.texts import Texts, read_texts
from megatron_opd.training.update import ObjectivePass, Outcome, Update, UpdateScale
from megatron_opd.watch.phases import ROLLOUT, Phases


@dataclass(frozen=True)
class Job:
    """Everything a run works with. Every rank has one."""

    config: Config
    layout: ParallelLayout
    groups: ProcessGroupCollection
    device: torch.device
    architecture: Architecture
    student: Student
    teacher: Teacher
    served: ServedModel | None  # what a teacher behind servers is
    average: WeightAverage | None  # what the teacher becomes, if it follows the student
    reference: MegatronTeacher | None
    objective: ObjectivePass
    engine: RolloutEngine
    texts: Texts
    prompts: PromptStream
    rollouts: RolloutStream
    checkpoints: CheckpointStore
    phases: Phases  # where in a step this rank is

    def notes(self, start: int) -> list[str]:
        """What the user should know before the first step, a line each."""
        steps = self.config.training.steps
        begin = f"resuming at step {start}" if start else "starting"
        if start == steps:
            begin = f"finished already ({steps} steps; raise training.steps to go on)"
        device = (
            f"{self.device.type}, {torch.get_num_threads()} threads" if self.device.type == "cpu" else "cuda"
        )
        engine = "attention is transformer-engine's; the other layers are megatron-core's own"
        described = self.teacher.described()
        role = "teachers" if self.teacher.names else "teacher"
        return [
            *([engine] if uses_transformer_engine(DTYPES[self.config.precision]) else []),
            *self.texts.notes,
            f"{begin}: {self.layout}, {self.config.precision} on {device}; {len(self.texts.training.prompts)} prompts",
            *([f"{role}: {described}"] if described else []),
        ]

    def draw(
        self, prompts: Sequence[Prompt], *, step: int, seed: int, samples: int, trained: bool = True
    ) -> list[Rollout]:
        """Responses of all prompts drawn with the current weights; the same list on every rank.

        Those that are `trained` on have the kept ids if the objective reads them.
        """
        sampling = sampling_of(self.config, self.texts, seed=seed, samples=samples, trained=trained)
        return generate_sharded(self.engine, prompts, sampling, weight_version=step, group=self.groups.dp_cp)

    def score(self, rollouts: Sequence[Rollout]) -> list[Update]:
        """The rollouts of a step in equal parts, one an update, scored by all models before the student moves.

        From the second update on the student is no longer the one that wrote the responses: its log-probs of
        now are kept, where the objective reads them.
        """
        count = self.config.training.updates_per_rollout
        shares = [
            rollouts[len(rollouts) * i // count : len(rollouts) * (i + 1) // count] for i in range(count)
        ]
        updates = []
        for number, share in enumerate(shares):
            lengths = [len(rollout.response_ids) for rollout in share[:SAMPLES]]
            update = replace(self.packed(share, self.texts.mask), lengths=lengths)
            if update.scale.loss_tokens > 0:
                update = replace(
                    update,
                    payloads=self.teacher_payloads(update),
                    old_logprobs=self._old_logprobs(update) if number > 0 else None,
                    reference_logprobs=self._reference_logprobs(update),
                    moved=number > 0,
                )
            updates.append(update)
        return updates

    def packed(self, rollouts: Sequence[Rollout], mask: LossMask | None = None) -> Update:
        """This rank's (shares of) microbatches of these rollouts, not scored yet."""
        pack_one = partial(
            pack,
            dp_size=self.layout.data,
            token_budget=self.config.training.microbatch_tokens,
            alignment=alignment_of_run(self.config),
            count_multiple=self.layout.microbatch_multiple,
            loss_mask=mask,
        )
        packed, routes = pack_by_route(rollouts, pack_one)
        cp = self.groups.cp
        mine = [
            microbatch.shard(cp.rank(), cp.size()).to(self.device)
            for microbatch in packed[self.groups.dp.rank()]
        ]
        return Update(mine, UpdateScale.of(packed), [None] * len(mine), whole=packed, routes=routes)

    def teacher_payloads(
        self, update: Update, *, evaluation: bool = False
    ) -> Sequence[TeacherPayload | None]:
        """What the teacher says of an update; in an evaluation what plain reverse KL is measured with."""
        read = self.config.objective.support.startswith("student_topk") and not evaluation
        ids = partial(self._student_ids, update.microbatches) if read else None
        return self.teacher.score(Asked(update.microbatches, update.whole, update.routes, evaluation, ids))

    def _student_ids(self, microbatches: Sequence[Microbatch]) -> list[Tensor | None]:
        settings = self.config.objective
        return likeliest_ids(
            self.student.ddps,
            self.student.chunks[-1],
            microbatches,
            self.groups,
            k=settings.k,
            vocab_size=self.texts.vocab_size,
            chunk_size=settings.head_chunk,
        )

    def _old_logprobs(self, update: Update) -> list[Tensor | None] | None:
        if not self.objective.objective.reads_old_logprobs:
            return None
        return self._logprobs(self.student.ddps, self.student.chunks[-1], update.microbatches)

    def _reference_logprobs(self, update: Update) -> list[Tensor | None] | None:
        if self.reference is None:
            return None
        with self.reference.resident():
            return self._logprobs(self.reference.chunks, self.reference.chunks[-1], update.microbatches)

    def apply(self, update: Update, progress: float) -> Outcome:
        """Move the student by one update, and the average after it; one without loss tokens is skipped on all ranks
        alike."""
        if update.scale.loss_tokens == 0:
            return Outcome(None, 0.0, applied=False)
        self.student.zero_grad()
        measured = self.objective.run(self.student.ddps, update, progress=progress)
        outcome = Outcome(measured, *self.student.apply_gradients())
        if outcome.applied and self.average is not None:
            self.average.follow(self.student)
        return outcome

    def heldout_reverse_kl(self, rollouts: Sequence[Rollout]) -> tuple[dict[str, float], int]:
        """Nats per token of plain reverse KL, whatever is trained on, so that runs compare; and how many tokens.

        Of several teachers each one's too, as `per_teacher` names them.

        A Megatron teacher is asked for hidden states, whatever its payload is else. Of a teacher behind servers the
        distribution is not known, and `reverse_kl_sampled` is its estimate from the sampled tokens: the mean of
        log p_s(y) - log p_t(y), unbiased where no token was cut from the sampling.

        A teacher with prompts of its own reads them here too, and one that follows the student is as it is now.
        """
        temperature = self.config.rollout.temperature
        if self.teacher.gives_distributions:
            name, measure = "reverse_kl", Objective(temperature=temperature)
        else:
            name = "reverse_kl_sampled"
            measure = Objective("policy_gradient", temperature=temperature, served_at=1.0)
        heldout = self.packed(rollouts)
        heldout = replace(heldout, payloads=self.teacher_payloads(heldout, evaluation=True))
        plain = replace(self.objective, objective=measure)
        sums = plain.run(self.student.ddps, heldout, forward_only=True).sums
        tokens = heldout.scale.loss_tokens
        return {name: sums[name] / tokens, **per_teacher([sums])}, tokens

    def _logprobs(
        self, chunks: Sequence[torch.nn.Module], gpt: GPT, microbatches: Sequence[Microbatch]
    ) -> list[Tensor | None]:
        return sampled_logprobs(
            chunks,
            gpt,
            microbatches,
            self.groups,
            temperature=self.config.rollout.temperature,
            vocab_size=self.texts.vocab_size,
            chunk_size=self.config.objective.head_chunk,
            kept_ids_only=self.config.objective.kept_ids_only,
        )


def init_distributed(timeout: timedelta) -> torch.device:
    """Join the processes that the launcher started (or be the only one); returns this rank's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return device


def set_up(config: Config, stop_requested: Callable[[], bool] = never) -> Job:
    """Check everything that can be checked, then build the models and load their weights.

    Once `stop_requested` says yes, rollouts of a step raise RolloutsStopped; those of an evaluation are finished.
    Raises UserError for anything the user can mend. Collective: every rank calls it.
    """
    check_offload(config)
    checked = check_before_start(config, int(os.environ.get("WORLD_SIZE", "1")))
    texts = read_texts(config, checked.vocab_size)
    texts = replace(texts, tasks=read_tasks(config, texts.tokenizer, checked.student.max_positions))
    layout = layout_of(checked.parallel)
    if os.environ.get("RANK", "0") == "0":
        hold(config.run_dir)
    cpu.install()
    device = init_distributed(config.timeouts.collective)
    groups = build_groups(layout, timeout=config.timeouts.collective)
    relay = Relay.of(checked, config.timeouts)
    chunks, teacher, reference = load_models(config, checked, layout, groups, device, relay)
    student = build_student(
        chunks, config.optimizer, groups, precision=config.precision, steps=config.training.steps
    )
    settings = config.objective
    objective = ObjectivePass(
        chunks[-1],
        teacher,
        checked.objective,
        texts.vocab_size,
        groups,
        settings.check,
        settings.head_chunk,
        config.rollout.mismatch_threshold,
    )
    phases = Phases()
    engine = rollout_engine(
        config, checked, texts, chunks, groups, lambda: phases.now == ROLLOUT and stop_requested()
    )
    prompts = PromptStream(texts.training.prompts, seed=config.seed, shuffle=config.data.shuffle)
    return Job(
        config=config,
        layout=layout,
        groups=groups,
        device=device,
        architecture=checked.student,
        student=student,
        teacher=teacher,
        served=checked.served,
        average=average_of(config, teacher),
        reference=reference,
        objective=objective,
        engine=engine,
        texts=texts,
        prompts=prompts,
        rollouts=RolloutStream(
            engine,
            prompts,
            sampling_of(config, texts, seed=config.seed, samples=config.rollout.samples_per_prompt),
            groups.dp_cp,
            prompts_per_step=config.rollout.prompts_per_step,
            max_staleness=config.rollout.max_staleness,
            last=config.training.steps,
        ),
        checkpoints=checkpoint_store(config, checked, texts, groups),
        phases=phases,
    )


def rollout_engine(
    config: Config,
    checked: Checked,
    texts: Texts,
    chunks: Sequence[GPT],
    groups: ProcessGroupCollection,
    stopped: Callable[[], bool],
) -> RolloutEngine:
    """What draws the rollouts, until `stopped` says yes. It draws no id that either model lacks."""
    if config.rollout.engine == "sglang":
        return SGLangEngine(texts.vocab_size, groups.mp, stopped=stopped)
    drawn = replace(checked.student, vocab_size=texts.vocab_size)
    return LocalEngine(chunks, drawn, groups, max_batch=config.rollout.max_batch, stopped=stopped)


def average_of(config: Config, teacher: Teacher) -> WeightAverage | None:
    """The moving average that the teacher becomes, if it follows the student."""
    if config.teacher.ema is None:
        return None
    assert isinstance(teacher, MegatronTeacher), "others are refused at the start"
    return WeightAverage(teacher.chunks, config.teacher.ema)


def sampling_of(config: Config, texts: Texts, *, seed: int, samples: int, trained: bool = True) -> Sampling:
    """How the run draws `samples` responses to a prompt, with the noise of `seed`."""
    settings = config.rollout
    return Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        stop_ids=texts.stop_ids,
        n=samples,
        seed=seed,
        keep_ids=trained and config.objective.kept_ids_only,
    )


def checkpoint_store(
    config: Config, checked: Checked, texts: Texts, groups: ProcessGroupCollection
) -> CheckpointStore:
    """Where the run saves, with what a checkpoint must have in common with the run that loads it."""
    routes = {}
    if config.teacher.route_field is not None:
        routes["teacher.route_field (SHA-256 of the prompts' teachers)"] = routes_digest(
            texts.training.prompts
        )
    return CheckpointStore(
        config.run_dir / "checkpoints",
        Retention(config.checkpoint.keep_last, config.checkpoint.keep_every),
        groups,
        config.student.path,
        identity={
            "student architecture": str(checked.student),
            "data.prompts (SHA-256 of their tokens)": texts.training.digest,
            "data.shuffle": str(config.data.shuffle),
            "seed": str(config.seed),
            "optimizer.name": config.optimizer.name,
            **routes,
        },
    )
