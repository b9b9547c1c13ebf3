"""Weight sync through the file system: the student is exported as a Hugging Face folder that the servers load.

Works wherever trainer and servers see the same files, with any number of servers; an export stays until the one after
the next, because a server that is restarted begins with it.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opd.checkpoint.folders import alike
from megatron_opd.checkpoint.hf_export import save_hf
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import Architecture
from megatron_opd.models.gpt import GPT
from megatron_opd.rollout.replicas import BadReply
from megatron_opd.rollout.servers import Servers
from megatron_opd.rollout.sglang import SGLangEngine
from megatron_opd.weight_sync.checksums import check_servers, exported_checksums

CHECK_EVERY = 10  # syncs; the first is checked too
RETRY_EVERY = 2.0  # seconds, while no server takes the weights


class DiskSync:
    """Brings the weights of `push` to the servers of `engine`, or starts `servers` with them.

    `servers` are those of this run, on the rank that owns them; None on other ranks and where somebody else started
    the servers at `urls`. Exports go to folders in `folder`; config and tokenizer come from `source`.
    """

    def __init__(
        self,
        engine: SGLangEngine,
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
        self._engine, self._arch, self._groups = engine, arch, groups
        self._source, self._folder, self._servers, self._say = source, folder, servers, say
        self._where: tuple[Sequence[str], str | None] = (urls, api_key)
        self._options = options  # of the clients, see `Replicas`
        self._syncs = 0
        self._exports: list[Path] = []

    def push(self, chunks: Sequence[GPT], version: int) -> None:
        """Give the servers these weights as `version`; when it returns, every later token is drawn with them.

        A server that does not take them gets no requests until it has them; those that this process owns are restarted
        with them. Collective over WORLD: `save_hf`, then 1 object all-gather (the first time 1 broadcast more). Raises
        UserError on every rank alike when no server takes the weights in time, or when their checksums differ.
        """
        export = self._folder / str(version)
        save_hf(chunks, self._arch, self._groups, self._source, export, replace=True)
        with alike(dist.group.WORLD):
            if dist.get_rank() == 0:
                self._bring(export, str(version))
        if self._syncs == 0:
            self._connect_others()
        if dist.get_rank() == 0:
            self._forget_older(export)
        self._syncs += 1

    def close(self) -> None:
        """Close the connections and end the servers that this process owns."""
        self._engine.close()
        if self._servers is not None:
            self._servers.stop()
        if dist.get_rank() == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _bring(self, export: Path, version: str) -> None:
        if self._syncs == 0:
            if self._servers is not None:
                self._servers.start(export, version)
                self._where = (self._servers.urls, self._servers.api_key)
            self._connect()
        if self._syncs > 0 or self._servers is None:
            self._update(export, version)
        if self._syncs % CHECK_EVERY == 0:
            self._check(export, version)

    def _connect(self) -> None:
        urls, key = self._where
        self._engine.connect(urls, api_key=key, first=self._groups.dp_cp.rank(), **self._options)

    def _connect_others(self) -> None:
        where = [self._where]
        dist.broadcast_object_list(where, src=0)
        self._where = where[0]
        if dist.get_rank() > 0 and self._engine.asks:
            self._connect()

    def _update(self, export: Path, version: str) -> None:
        """Ask all servers until one at least has the weights."""
        body = {"model_path": str(export.absolute()), "weight_version": version, "flush_cache": True}
        deadline = time.monotonic() + self._options["outage_timeout"]
        while True:
            with self._servers.updating(export, version) if self._servers else nullcontext():
                answers = self._engine.ask_all("/update_weights_from_disk", body)
            troubles = {url: trouble for url, answer in answers.items() if (trouble := _trouble(answer))}
            if len(troubles) < len(answers):
                break
            refused = all(isinstance(answer, UserError) for answer in answers.values())
            if refused or time.monotonic() > deadline:
                url, trouble = next(iter(troubles.items()))
                raise UserError(f"rollout.sglang: no server takes the weights of {export}; {url}: {trouble}")
            time.sleep(RETRY_EVERY)
        for url, trouble in troubles.items():
            self._say(f"SGLang: {url} did not take the weights {version}: {trouble}")
            if self._servers is not None:
                self._servers.restart(url)

    def _check(self, export: Path, version: str) -> None:
        """Compare checksums with the servers that have these weights."""
        models, servers = (self._engine.ask_all(path) for path in ("/model_info", "/server_info"))
        sums = {
            url: answer
            for url, answer in self._engine.ask_all("/weights_checker", {"action": "checksum"}).items()
            if _field(models[url], "weight_version") == version and _field(answer, "success")
        }
        if not sums:
            self._say(f"SGLang: no server gives checksums of the weights {version}; they are not compared")
        on_cpu = all(_field(servers[url], "device") == "cpu" for url in sums)
        check_servers(sums, exported_checksums(export, self._arch.num_layers) if on_cpu else None)

    def _forget_older(self, newest: Path) -> None:
        self._exports = [path for path in self._exports if path != newest] + [newest]
        while len(self._exports) > 2:
            shutil.rmtree(self._exports.pop(0), ignore_errors=True)


def _field(answer: Any, name: str) -> Any:
    """A field of an answer; None when the server gave another answer."""
    return answer.get(name) if isinstance(answer, dict) else None


def _trouble(answer: Any) -> str:
    """What is wrong with an answer to an update; empty when it succeeded."""
    if isinstance(answer, BadReply | UserError):
        return str(answer)
    return "" if _field(answer, "success") is True else str(answer)[:200]
