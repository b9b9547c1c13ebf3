"""Starts SGLang servers, waits until they answer, restarts those that die or hang, and leaves none behind.

Every server runs under `guard.py`, in a process group of its own, and writes to a log in the run directory. A restarted
server keeps its port and loads the newest weights that the run has written, so that clients see an outage and no more.
"""

import atexit
import itertools
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from megatron_opd.errors import Outage, UserError
from megatron_opd.rollout import guard
from megatron_opd.rollout.server_start import (
    ServerSettings,
    hold_port,
    server_command,
    server_environment,
)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEALTH_EVERY = 10.0  # seconds between two health checks of a server
HEALTH_TIMEOUT = 30.0  # SGLang itself gives up after 20 s
UNHEALTHY_LIMIT = 3  # failed checks in a row after which a server counts as hung
RESTARTS, RESTART_WINDOW = 3, 600.0  # restarts of a server at most within so many seconds
PROGRESS_EVERY = 15.0  # seconds between two lines about servers that are still starting


@dataclass
class _Server:
    held: socket.socket  # keeps the port for the server, whether it runs or not
    port: int
    log: Path
    number: int = field(
        default_factory=itertools.count().__next__
    )  # over all sets of servers of this process
    process: subprocess.Popen[bytes] | None = None
    model: Path | None = None  # the folder that it has started with
    started: float = 0.0
    ready: bool = False
    failed_checks: int = 0
    checked: float = 0.0
    restarts: list[float] = field(default_factory=list)
    given_up: bool = False


class Servers:
    """The servers that this process owns. They end with it, and with `stop`.

    `say` prints one line; it is called from the thread that watches the servers too. `api_key` is what they ask for
    beyond this machine, by default a new one; `first_port` that of the first server, 0: free ones. Servers that others
    give weights (`others_update`) are not ended when they do not answer: it may last that long.
    """

    def __init__(
        self,
        settings: ServerSettings,
        folder: Path,
        say: Callable[[str], None],
        *,
        api_key: str | None = None,
        first_port: int = 0,
        others_update: bool = False,
    ) -> None:
        self._settings, self._folder, self._say = settings, folder, say
        self._first_port, self._others_update = first_port, others_update
        local = settings.host in LOOPBACK
        self.api_key = None if local else api_key or secrets.token_urlsafe(32)
        self._servers: list[_Server] = []
        self._weights: tuple[Path, str] | None = None  # folder and version that a starting server loads
        self._lock = threading.Lock()  # held while servers start or their weights change
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None

    @property
    def urls(self) -> list[str]:
        """Where clients reach the servers."""
        host = self._settings.host
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        return [f"http://{f'[{host}]' if ':' in host else host}:{server.port}" for server in self._servers]

    @property
    def given_up(self) -> bool:
        """Whether none is left that would be started again."""
        return all(server.given_up for server in self._servers)

    def start(self, model: Path, version: str) -> None:
        """Start all servers with these weights and wait until every one answers.

        Raises Outage when a server ends or does not answer within `start_timeout`; none is left then.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._weights = (model.absolute(), version)
        logs = [self._folder / f"server-{index}.log" for index in range(self._settings.count)]
        try:
            self._servers = [
                _Server(*hold_port(self._settings.host, self._first_port and self._first_port + index), log)
                for index, log in enumerate(logs)
            ]
        except OSError as error:
            raise UserError(
                f"{self._settings.key}.host: cannot listen at {self._settings.host} ({error.strerror}): name an "
                "address of this machine"
            ) from None
        atexit.register(self.stop)
        began = time.monotonic()
        try:
            for server in self._servers:
                server.log.unlink(missing_ok=True)
                self._launch(server)
            self._wait_until_ready(began)
        except BaseException:
            self.stop()
            raise
        self._say(
            f"SGLang: {len(self.urls)} ready after {time.monotonic() - began:.0f} s: {', '.join(self.urls)}"
        )
        self._watcher = threading.Thread(target=self._watch, name="sglang-servers", daemon=True)
        self._watcher.start()

    @contextmanager
    def updating(self) -> Iterator[None]:
        """While the servers are given weights they are neither checked nor restarted."""
        with self._lock:
            yield

    def load_from(self, model: Path, version: str) -> None:
        """A server that is started from now on begins with these weights."""
        self._weights = (model.absolute(), version)

    def starting_from(self) -> set[Path]:
        """Folders of weights that servers which do not answer yet may still have to read."""
        return {server.model for server in self._servers if server.model is not None and not server.ready}

    def restart(self, url: str) -> None:
        """End a server that did not take its weights; the watch starts it again. One that starts already may go on."""
        server = self._servers[self.urls.index(url)]
        if server.ready:
            self._end(server)

    def stop(self) -> None:
        """End all servers, at once and for good."""
        self._stopping.set()
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join()
        for server in self._servers:
            self._end(server)
            server.held.close()
        atexit.unregister(self.stop)

    def command(self, port: int) -> list[str]:
        """The command line of a server."""
        assert self._weights is not None
        # Not on the command line, which every user of the machine can read.
        key_file = self._key_file() if self.api_key is not None else None
        return server_command(self._settings, *self._weights, port, key_file)

    def _key_file(self) -> Path:
        path = self._folder / "api-key.yaml"
        with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
            file.write(f"api-key: {self.api_key}\n")
        return path

    def _launch(self, server: _Server) -> None:
        command = [sys.executable, guard.__file__, str(os.getpid()), *self.command(server.port)]
        environment = server_environment(
            self._settings, self._servers.index(server), server.number, os.environ
        )
        with server.log.open("ab") as log:
            server.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        server.started, server.ready, server.failed_checks = time.monotonic(), False, 0
        server.model = self._weights[0] if self._weights is not None else None

    def _wait_until_ready(self, began: float) -> None:
        spoken = began
        while waiting := [server for server in self._servers if not server.ready]:
            for server in waiting:
                self._raise_if_ended(server)
                server.ready = self._answers(server, 5.0)
                server.checked = time.monotonic()
            seconds = time.monotonic() - began
            if seconds > self._settings.start_timeout and not all(server.ready for server in waiting):
                raise Outage(
                    f"{self._settings.key}.outage_timeout: an SGLang server does not answer after {seconds:.0f} s; it "
                    f"said last: {last_line(waiting[0].log)} (log: {waiting[0].log})"
                )
            if time.monotonic() - spoken > PROGRESS_EVERY:
                spoken = time.monotonic()
                self._say(f"SGLang: starting since {seconds:.0f} s: {last_line(waiting[0].log)}")
            time.sleep(0.2)

    def _raise_if_ended(self, server: _Server) -> None:
        assert server.process is not None
        code = server.process.poll()
        if code is not None:
            raise Outage(
                f"{self._settings.key}: an SGLang server ended with exit code {code} while it started: "
                f"{last_line(server.log)} (log: {server.log})"
            )

    def _answers(self, server: _Server, timeout: float) -> bool:
        """Whether the server generates. The key goes along, though SGLang asks for none here."""
        url = self.urls[self._servers.index(server)]
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        try:
            return (
                httpx.get(f"{url}/health", headers=headers, timeout=timeout, trust_env=False).status_code
                == 200
            )
        except httpx.HTTPError:
            return False

    def _watch(self) -> None:
        while not self._stopping.wait(1.0):
            if self._lock.acquire(timeout=0.5):
                try:
                    for server in self._servers:
                        if not self._stopping.is_set() and not server.given_up:
                            self._look_after(server)
                finally:
                    self._lock.release()

    def _look_after(self, server: _Server) -> None:
        """Restart a server that has ended; end one that hangs."""
        assert server.process is not None
        now = time.monotonic()
        code = server.process.poll()
        if code is not None:
            return self._restart(server, f"ended with exit code {code}")
        if server.ready and self._others_update:
            return
        if now - server.checked < (HEALTH_EVERY if server.ready else 1.0):
            return
        answers = self._answers(server, HEALTH_TIMEOUT if server.ready else 5.0)
        server.checked = time.monotonic()
        back, server.ready = answers and not server.ready, server.ready or answers
        if back:
            self._say(f"SGLang: server {server.port} is back after {now - server.started:.0f} s")
        server.failed_checks = 0 if answers else server.failed_checks + 1
        if server.ready and server.failed_checks >= UNHEALTHY_LIMIT:
            self._end(server)
            self._restart(server, f"did not answer {UNHEALTHY_LIMIT} health checks")
        elif not server.ready and now - server.started > self._settings.start_timeout:
            self._end(server)
            self._restart(server, "did not start in time")

    def _restart(self, server: _Server, why: str) -> None:
        now = time.monotonic()
        server.restarts = [when for when in server.restarts if now - when < RESTART_WINDOW]
        if len(server.restarts) >= RESTARTS:
            server.given_up = True
            self._say(
                f"SGLang: server {server.port} {why}; given up after {RESTARTS} restarts (log: {server.log})"
            )
            return
        self._say(f"SGLang: server {server.port} {why}; restarting it")
        server.restarts.append(now)
        self._launch(server)

    def _end(self, server: _Server) -> None:
        if server.process is None:
            return
        server.process.terminate()  # the guard kills the server's whole tree
        try:
            server.process.wait(10)
        except subprocess.TimeoutExpired:
            server.process.kill()  # and the kernel the server with it
            server.process.wait()


def last_line(log: Path) -> str:
    """The last line of a log that says something: an exception's if the server died of one."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return "(no output)"
    lines = [line for line in lines if line.strip(" -=~^*")]
    return lines[-1][:300] if lines else "(no output)"
