"""`RolloutStream`: the rollouts of one step after another, drawn when they are needed or some steps ahead.

A step's prompts count as taken with its rollouts: what is drawn ahead and never trained on is drawn again, from the
same prompts, by the run that goes on from a checkpoint.
"""

from collections import deque
from collections.abc import Sequence

import torch.distributed as dist

from megatron_opd.data.prompts import PromptStream
from megatron_opd.data.rollouts import Rollout
from megatron_opd.errors import UserError
from megatron_opd.rollout.sampling import Sampling
from megatron_opd.rollout.sglang import Drawing, SGLangEngine, failed
from megatron_opd.rollout.sharded import RolloutEngine, gathered, generate_sharded, share


class RolloutStream:
    """Takes `prompts_per_step` prompts a step from `prompts` until step `last`, and has `engine` answer them.

    With `max_staleness` n > 0, which needs SGLang, the rollouts of n steps are on their way while a step trains: those
    of step k + n are begun when step k takes its own. `group` has the replicas.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        prompts: PromptStream,
        sampling: Sampling,
        group: dist.ProcessGroup,
        *,
        prompts_per_step: int,
        max_staleness: int,
        last: int,
    ) -> None:
        self._engine, self._prompts, self._sampling, self._group = engine, prompts, sampling, group
        self._per_step, self._staleness, self._last = prompts_per_step, max_staleness, last
        self._ahead: deque[Drawing] = deque()  # those of the coming steps, this replica's share

    def take(self, step: int) -> list[Rollout]:
        """The rollouts of `step`, the step after the last one taken; the same list on every rank.

        The weights' version is `step` - 1 now, and no token is drawn by weights more than `max_staleness` versions
        older. Collective, and raises UserError, like `generate_sharded`. Then nothing is taken, and the next call for
        the step (servers may have lost the weights and got them again) begins anew what has failed, and only that.
        """
        if self._staleness == 0:
            prompts = self._prompts.peek(self._per_step)
            rollouts = generate_sharded(
                self._engine, prompts, self._sampling, weight_version=step - 1, group=self._group
            )
            self._prompts.take(self._per_step)
            return rollouts
        engine = self._engine
        assert isinstance(engine, SGLangEngine)
        # Nothing, except at the start or after a failure.
        self._begin(engine, step, step + self._staleness - 1)
        rollouts = gathered(lambda: engine.take(self._ahead[0]), self._group)
        newest = max(rollout.token_versions[-1] for rollout in rollouts)
        if newest >= step:
            raise UserError(
                f"rollout.sglang: a server has weights {newest}, which step {step} cannot have given it: restart the "
                "servers, then resume"
            )
        self._ahead.popleft()
        self._prompts.take(self._per_step)
        self._begin(engine, step + 1, step + self._staleness)
        return rollouts

    def _begin(self, engine: SGLangEngine, first: int, to: int) -> None:
        """Begin the rollouts of the steps from `first`, the next to be taken, up to `to`, but those on their way."""
        for index, step in enumerate(range(first, min(to, self._last) + 1)):
            if index < len(self._ahead) and not failed(self._ahead[index]):
                continue
            prompts = self._prompts.peek(self._per_step, skip=index * self._per_step)
            oldest = max(0, step - 1 - self._staleness)
            drawing = engine.submit(share(prompts, self._group), self._sampling, oldest)
            if index < len(self._ahead):
                self._ahead[index] = drawing
            else:
                self._ahead.append(drawing)


def staleness(rollouts: Sequence[Rollout], version: int) -> dict[str, float]:
    """Mean over the response tokens, and maximum, of the versions by which the weights that drew them lag `version`."""
    lags = [version - drawn for rollout in rollouts for drawn in rollout.token_versions]
    return {"staleness": sum(lags) / len(lags), "staleness_max": max(lags)}
