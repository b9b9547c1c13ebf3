"""A run's checkpoints: model, optimizer and position, saved while the training goes on, and loaded at any layout.

`checkpoints/step_00000040/` holds `state/` (megatron dist_checkpointing: model and optimizer, loads at any layout),
`run.json` (step, prompt position), the Hugging Face `config.json` and tokenizer (so that the folder is a model
folder), and `checksums.json`. How such a folder appears, complete or not at all, is in `checkpoint.published`.

Nothing random is saved: sampling noise is counter-based and the models have no dropout.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint.api import CheckpointException

from megatron_opd.checkpoint.published import (
    Retention,
    aside_of_step,
    folder_of_step,
    newest_intact,
    publish,
    published,
)
from megatron_opd.checkpoint.state_read import plain_data_only
from megatron_opd.checkpoint.weights import STATE, TEACHER_PREFIX, load_chunks, sharded_weights
from megatron_opd.checkpoint.writing import StateWriting, merged
from megatron_opd.errors import WRITER_KILLED, Outage, UserError, why_refused
from megatron_opd.models.gpt import GPT
from megatron_opd.parallel.groups import all_ranks

_SHARDED = "optimizer_sharded"  # in run.json: whether the state is that of the distributed optimizer
_TEACHER = "teacher"  # in run.json: whether the state has a teacher; in the state: its weights
_UNRECORDED = {"optimizer.name": "adam"}  # of an identity: what every run had before it was written down


@dataclass(frozen=True)
class _Save:
    """A save under way. Of `run_state` rank 0's is written."""

    step: int
    writing: StateWriting
    run_state: dict[str, Any]


@dataclass(eq=False)
class CheckpointStore:
    """The checkpoints of one run directory; every method is called by all ranks, those of WORLD.

    A save has two parts: `save` begins it, after which the training may go on, and `publish` ends it. Ranks without a
    part of the model call `join_save`, `publish` and `weights.join_load` where the others save, publish and load.

    `model_folder` gives each checkpoint its config.json and tokenizer. `identity` is what a run has to share with the
    checkpoints it resumes from: key -> value, both as text.
    """

    folder: Path
    retention: Retention
    groups: ProcessGroupCollection
    model_folder: Path
    identity: Mapping[str, str]
    _under_way: _Save | None = field(default=None, init=False)

    def save(
        self,
        step: int,
        chunks: Sequence[GPT],
        optimizer: Any,
        run_state: dict[str, Any],
        teacher: Sequence[GPT] = (),
    ) -> None:
        """Begin to write the checkpoint of `step`, as everything is now; the one before has to be published.

        `teacher` are the chunks of a teacher whose weights move.
        Raises UserError, with the earlier checkpoints untouched, when the disk is or becomes full.
        """
        state = sharded_state(chunks, optimizer, self.groups, is_loading=False, teacher=teacher)
        about = {"step": step, "identity": dict(self.identity), _SHARDED: _is_sharded(optimizer)}
        about |= {_TEACHER: True} if teacher else {}
        self._begin(step, state, {**run_state, **about})

    def join_save(self, step: int) -> None:
        """What a rank without a part of the model does while the others begin a save."""
        self._begin(step, {}, {})

    def _begin(self, step: int, state: dict[str, Any], run_state: dict[str, Any]) -> None:
        assert self._under_way is None, "one save at a time"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_space(_local_bytes(state))
        aside = aside_of_step(self.folder, step)
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            (aside / STATE).mkdir(parents=True)
        dist.barrier()
        try:
            writing = StateWriting(state, aside / STATE, all_save=self._all_save)
        except Exception as error:
            raise self._given_up(step, error) from error
        self._under_way = _Save(step, writing, run_state)

    @property
    def under_way(self) -> bool:
        """Whether a save has begun that is not published."""
        return self._under_way is not None

    def written(self) -> bool:
        """Whether a save is under way that `publish` would not have to wait for. Ranks of the model: 1 all-reduce."""
        if self._under_way is None:
            return False
        device = "cuda" if torch.cuda.is_available() else "cpu"
        busy = torch.tensor(not self._under_way.writing.done, dtype=torch.int32, device=device)
        dist.all_reduce(busy, op=dist.ReduceOp.MAX, group=all_ranks(self.groups))
        return not busy.item()

    def publish(self) -> Path:
        """Wait for the save under way, make its folder appear, then delete what `retention` does not keep.

        Raises UserError, with the earlier checkpoints untouched, when something of it could not be written.
        """
        assert self._under_way is not None
        save = self._under_way
        final = folder_of_step(self.folder, save.step)
        failure = self._complete(save, final)
        self._under_way = None
        self._agree(save.step, failure)
        return final

    def _complete(self, save: _Save, final: Path) -> BaseException | None:
        """Returns what went wrong if rank 0 knows it, or every rank."""
        try:
            known = save.writing.finish()
        except CheckpointException as error:
            return error
        except Exception as error:
            raise self._given_up(save.step, error) from error
        known = merged(known)
        if dist.get_rank() == 0:
            try:
                aside = aside_of_step(self.folder, save.step)
                publish(aside, final, self.model_folder, save.run_state, known)
                self.retention.apply(self.folder)
            except Exception as error:
                return error
        return None

    def abandon(self) -> None:
        """Stop writing; not collective, for a rank that ends by an error."""
        if self._under_way is not None:
            self._under_way.writing.abandon()

    def _agree(self, step: int, failure: BaseException | None) -> None:
        """Raise on all ranks when rank 0 has found something wrong. 1 broadcast."""
        mine = None if failure is None else self._given_up(step, failure)
        told = (
            mine if mine is None or isinstance(mine, UserError) else RuntimeError(f"step {step}: see rank 0")
        )
        found = [told]
        dist.broadcast_object_list(found, src=0)
        if found[0] is not None:
            raise (mine if mine is not None and dist.get_rank() == 0 else found[0]) from failure

    @property
    def _all_save(self) -> bool:
        """Whether every rank has a part of the model."""
        return (
            self.groups.intra_dist_opt is not None and all_ranks(self.groups).size() == dist.get_world_size()
        )

    def _check_space(self, local_bytes: int) -> None:
        """Before anything is written, so that all ranks give up together."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        needed = torch.tensor(float(local_bytes), dtype=torch.float64, device=device)
        free = torch.tensor(float(shutil.disk_usage(self.folder).free), dtype=torch.float64, device=device)
        dist.all_reduce(needed)
        dist.all_reduce(free, op=dist.ReduceOp.MIN)
        if needed.item() > free.item():
            sizes = f"{needed.item() / 1e9:.2f} GB needed, {free.item() / 1e9:.2f} GB free"
            raise self._refused(f"no space left on device ({sizes})")

    def _refused(self, reason: str) -> UserError:
        kept = ", ".join(path.name for path in published(self.folder)) or "none"
        return (Outage if reason == WRITER_KILLED else UserError)(
            f"cannot save a checkpoint to {self.folder}: {reason}; mend that (or lower checkpoint.keep_last) and start "
            f"the same command again to resume (checkpoints kept: {kept})"
        )

    def _given_up(self, step: int, error: BaseException) -> BaseException:
        """Remove what was written; a full disk or a refused write is a UserError, anything else is `error` itself."""
        if dist.get_rank() == 0:
            shutil.rmtree(aside_of_step(self.folder, step), ignore_errors=True)
        reason = why_refused(error)
        return error if reason is None else self._refused(reason)

    def newest_intact(self) -> Path | None:
        """`published.newest_intact` of the folder, on all ranks alike. Rank 0 reads, 1 broadcast."""
        answer: list[Path | UserError | None] = [None]
        if dist.get_rank() == 0:
            try:
                answer = [newest_intact(self.folder)]
            except UserError as error:
                answer = [error]
        dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], UserError):
            raise answer[0]
        return answer[0]

    def load(
        self, folder: Path, chunks: Sequence[GPT], optimizer: Any, teacher: Sequence[GPT] = ()
    ) -> dict[str, Any]:
        """Load model, optimizer and `teacher` from a checkpoint written at any layout; returns its run state.

        Raises UserError when the checkpoint is not of this run: its `identity` differs, or only one of the two has a
        teacher; and when one of the two optimizers is megatron-core's distributed one, which names its state
        differently.
        """
        run_state = json.loads((folder / "run.json").read_text())
        for key, value in self.identity.items():
            found = run_state["identity"].get(key, _UNRECORDED.get(key))
            if found != value:
                raise UserError(
                    f"{folder} belongs to a run with {key} = {found}, this one has {value}: give this run a run_dir of "
                    f"its own, or restore {key}"
                )
        sharded = run_state.pop(_SHARDED, _is_sharded(optimizer))
        if sharded != _is_sharded(optimizer):
            raise UserError(
                f"optimizer.distributed: {folder} was saved with {str(sharded).lower()}, which this run cannot load: "
                f"set it to {str(sharded).lower()}"
            )
        if run_state.pop(_TEACHER, False) != bool(teacher):
            remedy = "leave it null" if teacher else "set it to the decay that the run had"
            raise UserError(
                f"teacher.ema: {folder} was saved {'without' if teacher else 'with'} a teacher that follows the "
                f"student: {remedy}, or give this run a run_dir of its own"
            )
        with plain_data_only(folder / STATE):
            state = dist_checkpointing.load(
                sharded_state(chunks, optimizer, self.groups, is_loading=True, teacher=teacher),
                str(folder / STATE),
            )
        load_chunks(chunks, state)
        if teacher:
            load_chunks(teacher, state[_TEACHER])
        optimizer.load_state_dict(state["optimizer"])
        return run_state


def sharded_state(
    chunks: Sequence[GPT],
    optimizer: Any,
    groups: ProcessGroupCollection,
    *,
    is_loading: bool,
    teacher: Sequence[GPT] = (),
) -> dict[str, Any]:
    """Model, optimizer and teacher as megatron's sharded state dict, in the form that loads at another layout."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",  # the default type does not save torch's Adam at all
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.dp_cp,
    }
    state: dict[str, Any] = dict(sharded_weights(chunks, metadata))
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    if teacher:
        state[_TEACHER] = sharded_weights(teacher, metadata)
        add_prefix_for_sharding(state[_TEACHER], TEACHER_PREFIX)
    return state


def _is_sharded(optimizer: Any) -> bool:
    return bool(optimizer.config.use_distributed_optimizer)


def _local_bytes(state: Any) -> int:
    """Bytes that this rank will write: of replicated tensors only the main replica counts."""
    if isinstance(state, dict):
        return sum(_local_bytes(value) for value in state.values())
    if isinstance(state, list | tuple):
        return sum(_local_bytes(value) for value in state)
    if not is_main_replica(getattr(state, "replica_id", 0)):
        return 0
    data = getattr(state, "data", None)
    return data.numel() * data.element_size() if torch.is_tensor(data) else 0
