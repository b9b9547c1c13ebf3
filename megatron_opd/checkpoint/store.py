"""A run's checkpoints: written aside, published atomically, checksummed, resumed from the newest intact one.

`checkpoints/step_00000040/` holds `state/` (megatron dist_checkpointing: model and optimizer, loads at any layout),
`run.json` (step, prompt position), the Hugging Face `config.json` and tokenizer (so that the
folder is a model folder), and `checksums.json`. It is written as `.writing_step_...` and renamed when complete, so a
save cut short is never picked up. `checkpoints/latest` is a link for people; resuming looks at the folders themselves.

Nothing random is saved: sampling noise is counter-based and the models have no dropout.
"""

import json
import os
import queue
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opd.checkpoint.checksums import first_damaged_file, write_checksums
from megatron_opd.checkpoint.state_read import plain_data_only
from megatron_opd.checkpoint.weights import (
    STATE,
    TEACHER_PREFIX,
    copy_model_files,
    load_chunks,
    sharded_weights,
)
from megatron_opd.errors import UserError, why_refused
from megatron_opd.models.gpt import GPT
from megatron_opd.parallel.groups import all_ranks

_PREFIX, _ASIDE, _LATEST = "step_", ".writing_", "latest"
_SHARDED = "optimizer_sharded"  # in run.json: whether the state is that of the distributed optimizer
_TEACHER = "teacher"  # in run.json: whether the state has a teacher; in the state: its weights


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run directory; every method is called by all ranks, those of WORLD.

    Ranks without a part of the model call `join_save` and `weights.join_load` where the others save and load.

    `model_folder` gives each checkpoint its config.json and tokenizer. `identity` is what a run has to share with the
    checkpoints it resumes from: key -> value, both as text.
    """

    folder: Path
    keep_last: int
    groups: ProcessGroupCollection
    model_folder: Path
    identity: Mapping[str, str]

    def save(
        self,
        step: int,
        chunks: Sequence[GPT],
        optimizer: Any,
        run_state: dict[str, Any],
        teacher: Sequence[GPT] = (),
    ) -> Path:
        """Write and publish the checkpoint of `step`, then delete all but the newest `keep_last`.

        `teacher` are the chunks of a teacher whose weights move.
        Raises UserError, with the earlier checkpoints untouched, when the disk is or becomes full.
        """
        state = sharded_state(chunks, optimizer, self.groups, is_loading=False, teacher=teacher)
        about = {"step": step, "identity": dict(self.identity), _SHARDED: _is_sharded(optimizer)}
        about |= {_TEACHER: True} if teacher else {}
        return self._write(step, state, {**run_state, **about})

    def join_save(self, step: int) -> None:
        """What a rank without a part of the model does while the others save."""
        self._write(step, {}, {})

    def _write(self, step: int, state: dict[str, Any], run_state: dict[str, Any]) -> Path:
        """Of `run_state` rank 0's is written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_space(_local_bytes(state))
        final = self.folder / f"{_PREFIX}{step:08d}"
        aside = self.folder / f"{_ASIDE}{final.name}"
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            (aside / STATE).mkdir(parents=True)
        dist.barrier()
        # megatron-core would have a server process hand its results from this process to itself, and that process
        # outlives a training that is killed.
        filesystem_async._results_queue = queue.Queue()
        try:
            dist_checkpointing.save(
                state,
                str(aside / STATE),
                preprocess_common_before_consistancy_check=None if self._all_save else _nothing,
            )
            if dist.get_rank() == 0:
                self._publish(aside, final, run_state)
        except Exception as error:
            self._give_up(aside, error)
        dist.barrier()
        return final

    @property
    def _all_save(self) -> bool:
        """Whether every rank has a part of the model; megatron-core warns of ranks that differ in what is common."""
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
        return UserError(
            f"cannot save a checkpoint to {self.folder}: {reason}; mend that (or lower checkpoint.keep_last) and start "
            f"the same command again to resume (checkpoints kept: {kept})"
        )

    def _give_up(self, aside: Path, error: Exception) -> None:
        """Remove what was written; a full disk or a refused write becomes a UserError."""
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        reason = why_refused(error)
        if reason is None:
            raise error
        raise self._refused(reason) from error

    def _publish(self, aside: Path, final: Path, run_state: dict[str, Any]) -> None:
        copy_model_files(self.model_folder, aside)
        (aside / "run.json").write_text(json.dumps(run_state, indent=1))
        write_checksums(aside, aside.rglob("*"))
        for path in aside.rglob("*"):
            _sync(path)
        _sync(aside)
        shutil.rmtree(final, ignore_errors=True)  # a later lineage saves the same step again
        os.replace(aside, final)
        link = self.folder / f"{_ASIDE}{_LATEST}"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        os.replace(link, self.folder / _LATEST)
        _sync(self.folder)
        for old in published(self.folder)[: -self.keep_last]:
            shutil.rmtree(old)

    def newest_intact(self) -> Path | None:
        """The newest checkpoint whose files all match their checksums; None when there are no checkpoints.

        Newer ones that are damaged are named and renamed `damaged_step_...`. Raises UserError, and renames nothing,
        when all are damaged: starting anew would throw the run away. Rank 0 reads, 1 broadcast.
        """
        answer: list[Path | UserError | None] = [None]
        if dist.get_rank() == 0:
            try:
                answer = [self._newest_intact()]
            except UserError as error:
                answer = [error]
        dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], UserError):
            raise answer[0]
        return answer[0]

    def _newest_intact(self) -> Path | None:
        damaged: dict[Path, str] = {}
        for folder in reversed(published(self.folder)):
            file = first_damaged_file(folder)
            if file is None:
                for newer, damage in damaged.items():
                    aside = newer.with_name(f"damaged_{newer.name}")
                    shutil.rmtree(aside, ignore_errors=True)
                    newer.rename(aside)
                    print(
                        f"warning: checkpoint {newer} is damaged ({damage}): now {aside.name}",
                        file=sys.stderr,
                    )
                return folder
            damaged[folder] = file
        if damaged:
            names = ", ".join(f"{folder.name} ({file})" for folder, file in damaged.items())
            raise UserError(
                f"{self.folder}: no intact checkpoint: {names}; restore one, or start with a new run_dir"
            )
        return None

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
            found = run_state["identity"].get(key)
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


def _nothing(common: dict[str, Any]) -> dict[str, Any]:
    del common
    return {}


def _is_sharded(optimizer: Any) -> bool:
    return bool(optimizer.config.use_distributed_optimizer)


def published(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())


def _sync(path: Path) -> None:
    """Bring a file or directory to the disk, so that the rename that publishes it cannot come before it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
