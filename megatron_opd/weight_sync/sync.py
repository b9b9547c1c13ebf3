"""`WeightSync`: what all transports of weights share, from the first start of the servers to their end.

Started servers begin with an export on disk, whatever the transport. A later push is attempted until a server has
taken it. In an attempt the servers that answer first get a version that nobody asks for, then the weights, and the
push's version at the very end: whatever fails in between, no token drawn with mixed weights passes for a good one.
A server that was restarted begins with the newest export that there is. `tensor` and `distributed` make no later one
than the first: such a server gets no requests before the next push, which comes at once when no other is left
(`WeightsLost`).
"""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opd.checkpoint.folders import alike
from megatron_opd.errors import Outage, UserError
from megatron_opd.models.architecture import Architecture
from megatron_opd.models.gpt import GPT
from megatron_opd.parallel.groups import all_ranks
from megatron_opd.rollout.servers import Servers
from megatron_opd.rollout.sglang import SGLangEngine
from megatron_opd.weight_sync.checksums import SampleChecksums, check_servers
from megatron_opd.weight_sync.transport import (
    Abandoned,
    Outgoing,
    Transport,
    Trouble,
    field,
    troubles_of,
)

CHECK_EVERY = 10  # syncs; the first is checked too
RETRY_EVERY = 2.0  # seconds, while no server takes the weights
ANSWER_TIMEOUT = 30.0  # seconds that a server has for a request that moves no weights
FLUSH_TIMEOUT = (
    20.0  # seconds that a server waits for its last requests, health checks say, to flush its cache
)

P = ParamSpec("P")
R = TypeVar("R")


class WeightSync:
    """Brings the weights of `push` to the servers of `engine` by `transport`, or starts `servers` with them.

    `servers` are those of this run, on the rank that owns them; None on other ranks and where somebody else started
    the servers at `urls`. Exports lie in `folder`, which is removed at the end; their config and tokenizer come from
    `source`.
    """

    def __init__(
        self,
        engine: SGLangEngine,
        transport: Transport,
        arch: Architecture,
        groups: ProcessGroupCollection,
        *,
        source: Path,
        folder: Path,
        servers: Servers | None,
        urls: Sequence[str],
        api_key: str | None,
        options: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._engine, self._transport, self._arch, self._groups = engine, transport, arch, groups
        self._source, self._folder, self._servers, self._say = source, folder, servers, say
        self._urls, self._api_key = urls, api_key
        self._options = options  # of the clients, see `Replicas`
        self._syncs = 0
        self._exports: list[Path] = []

    def push(self, chunks: Sequence[GPT], version: int) -> None:
        """Give the servers these weights as `version`; when it returns, every later token is drawn with them.

        A server that does not take them gets no requests until it has them; those that this process owns are
        restarted. Collective over the model's ranks: the transport's, and a few object collectives. Raises UserError on
        every rank alike when no server takes the weights in time, or when their checksums differ.
        """
        check = dist.get_rank() == 0 and self._syncs % CHECK_EVERY == 0
        sample = SampleChecksums(self._arch.num_layers) if check else None
        weights = Outgoing(chunks, self._arch, self._groups, self._source, str(version), sample)
        start = self._syncs == 0 and not self._urls
        if start:
            weights.export(self._folder / weights.version)
            self._urls, self._api_key = self._on_rank_0(WeightSync._start, weights)
        if self._syncs == 0 and self._engine.asks:
            self._engine.connect(
                self._urls, api_key=self._api_key, first=self._groups.dp_cp.rank(), **self._options
            )
        if start:
            self._on_rank_0(WeightSync._check, weights, self._urls)
        else:
            if self._syncs == 0:
                # One that was killed while servers of somebody else were paused has left them so.
                self._on_rank_0(lambda sync: sync._engine.wake())
            self._give(weights)
        self._forget_older(weights.exported)
        self._syncs += 1

    def close(self) -> None:
        """Close the connections and end the servers that this process owns."""
        self._engine.close()
        if self._servers is not None:
            self._servers.stop()
        if dist.get_rank() == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _on_rank_0(
        self, act: Callable[Concatenate["WeightSync", P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """What `act` returns on rank 0, or the error it raises there, on every rank of the model. Collective."""
        outcome: list[Any] = [None]
        everyone = all_ranks(self._groups)
        with alike(everyone):
            if dist.get_rank() == 0:
                outcome = [act(self, *args, **kwargs)]
        dist.broadcast_object_list(outcome, group=everyone, group_src=0)
        result: R = outcome[0]
        return result

    def _start(self, weights: Outgoing) -> tuple[Sequence[str], str | None]:
        assert self._servers is not None and weights.exported is not None
        self._servers.start(weights.exported, weights.version)
        return self._servers.urls, self._servers.api_key

    def _give(self, weights: Outgoing) -> None:
        """Attempts until one server at least has the weights."""
        deadline = time.monotonic() + self._options["outage_timeout"]
        failed: dict[str, Trouble] = {}  # servers that lack the weights, and why; rank 0's
        done = False
        rank_0 = dist.get_rank() == 0
        while not done:
            updating = self._servers.updating() if self._servers else nullcontext()
            with updating, self._engine.paused(tell=rank_0):
                takers = self._on_rank_0(WeightSync._announce, weights, failed)
                if takers:
                    urls = takers if rank_0 else []
                    failed |= self._transport.send(weights, self._engine.ask, urls)
                done = self._on_rank_0(WeightSync._finish, weights, takers, failed)
            if not done:
                self._on_rank_0(WeightSync._wait, weights, failed, deadline)

    def _announce(self, weights: Outgoing, failed: dict[str, Trouble]) -> list[str]:
        """Which servers are there, now under a version that nobody asks for; those at fault before only if alone."""
        innocent = [url for url in self._urls if isinstance(failed.get(url, Abandoned()), Abandoned)]
        for urls in (innocent, self._urls):
            for url in urls:
                failed.pop(url, None)
            asked = dict.fromkeys(urls, _version(f"{weights.version}, incomplete"))
            failed |= troubles_of(self._engine.ask("/update_weight_version", asked, ANSWER_TIMEOUT))
            takers = [url for url in urls if url not in failed]
            if takers:
                return takers
        return []

    def _finish(self, weights: Outgoing, takers: Sequence[str], failed: dict[str, Trouble]) -> bool:
        """Flush caches, compare checksums, give the servers that have the weights their version. Whether any has."""
        done = [url for url in takers if url not in failed]
        if done:
            failed |= self._flush(done)
            done = [url for url in done if url not in failed]
            self._check(weights, done)
            asked = dict.fromkeys(done, _version(weights.version))
            failed |= troubles_of(self._engine.ask("/update_weight_version", asked, ANSWER_TIMEOUT))
        if self._servers is not None and weights.exported is not None:
            self._servers.load_from(weights.exported, weights.version)
        if all(url in failed for url in done):
            return False
        for url, trouble in failed.items():
            self._say(f"SGLang: {url} did not take the weights {weights.version}: {trouble}")
            if self._servers is not None:
                self._servers.restart(url)
        return True

    def _flush(self, urls: Sequence[str]) -> dict[str, Trouble]:
        """At once, which a paused server does too; where requests still run, when these have ended."""
        busy = troubles_of(self._engine.ask("/flush_cache", {url: {} for url in urls}, ANSWER_TIMEOUT))
        path = f"/flush_cache?timeout={FLUSH_TIMEOUT:g}"
        return troubles_of(self._engine.ask(path, {url: {} for url in busy}, ANSWER_TIMEOUT))

    def _wait(self, weights: Outgoing, failed: dict[str, Trouble], deadline: float) -> None:
        refused = all(isinstance(trouble, UserError) for trouble in failed.values())
        if refused or time.monotonic() > deadline:
            url, trouble = next(iter(failed.items()))
            raise (UserError if refused else Outage)(
                f"rollout.sglang: no server takes the weights {weights.version}; {url}: {trouble}"
            )
        time.sleep(RETRY_EVERY)

    def _check(self, weights: Outgoing, urls: Sequence[str]) -> None:
        """Compare checksums, if they are due, with servers that have the weights."""
        if weights.sample is None or not urls:
            return
        answers = self._engine.ask("/weights_checker", {url: {"action": "checksum"} for url in urls})
        sums = {url: answer for url, answer in answers.items() if field(answer, "success")}
        if not sums:
            self._say(
                f"SGLang: no server gives checksums of the weights {weights.version}; they are not compared"
            )
            return
        infos = self._engine.ask("/server_info", dict.fromkeys(sums))
        on_cpu = all(field(info, "device") == "cpu" for info in infos.values())
        check_servers(sums, weights.sample.sums() if on_cpu else None)

    def _forget_older(self, newest: Path | None) -> None:
        """Remove exports but the newest, the one before it, and those that servers are just starting from."""
        if newest is None or dist.get_rank() > 0:
            return
        exports = [*(path for path in self._exports if path != newest), newest]
        needed = self._servers.starting_from() if self._servers is not None else set()
        self._exports = [path for path in exports if path in exports[-2:] or path.absolute() in needed]
        for path in set(exports) - set(self._exports):
            shutil.rmtree(path, ignore_errors=True)


def _version(version: str) -> dict[str, Any]:
    return {"new_version": version, "abort_all_requests": False}
