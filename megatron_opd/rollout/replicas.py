"""Several SGLang servers as one: each request goes to the least loaded, and away from a server that fails.

A server that fails rests, a little longer each time, and gets requests again once it generates with the weights that
are asked for. While the servers are paused no request is sent, and those that the pause has cut off go on afterwards,
at any server. Everything here runs in one event loop.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import httpx

from megatron_opd.errors import Outage, UserError

Result = TypeVar("Result")
Request = tuple[dict[str, Any], Callable[[Any], Result]]  # the body, and what makes the answer a result
Body = dict[str, Any] | bytes | None  # of a POST, bytes if it is JSON already; None: a GET

ATTEMPTS = 5  # of one request, over all servers
FIRST_REST, LONGEST_REST = 0.25, 15.0  # seconds; doubled with each failure in a row
KEEP_ALIVE = 3.0  # seconds an idle connection is kept; SGLang closes them after 5
CONNECT_TIMEOUT = 10.0  # seconds
PROBE_TIMEOUT = 30.0  # seconds; SGLang's own health check gives up after 20
ANY_WEIGHTS = ""  # as a version: whichever weights a server has
LOST_AFTER = 10.0  # seconds without a server that has the weights, while one has others


class BadReply(Exception):
    """What a server sent is not an answer to the request; the message says why. Another attempt may succeed."""


class WeightsLost(Outage):
    """Servers work, but none has the weights that are asked for; it helps to give them these again."""


class Interrupted(Exception):
    """An answer that was cut off; `request` asks for the whole result from a server with weights `version`.

    `further`: the answer brought something, and `request` asks for less than the one before. The message is what the
    server says of it.
    """

    def __init__(self, request: Request[Any], version: str, why: str, *, further: bool) -> None:
        super().__init__(why)
        self.request, self.version, self.further = request, version, further


@dataclass(frozen=True)
class Wanted:
    """The weights that may answer: those of `version`, with `or_newer` also later ones where versions are numbers."""

    version: str
    or_newer: bool = False

    def suits(self, found: Any) -> bool:
        """Whether a server's version will do. "7, incomplete", a server's while it gets weights, never does."""
        if self.version in (ANY_WEIGHTS, found):
            return True
        numbers = isinstance(found, str) and found.isdecimal() and self.version.isdecimal()
        return self.or_newer and numbers and int(found) > int(self.version)


@dataclass(eq=False)
class Replica:
    """One server as this client sees it."""

    url: str
    in_flight: int = 0
    failures: int = 0  # in a row
    trouble: str = ""  # why it gets no requests; empty while it does
    outdated: bool = False  # it generates, with other weights than are asked for
    stopped: bool = False  # after a pause it was told to go on, and has not said that it does
    probe: asyncio.Task[None] | None = None  # waits for the end of the trouble


class Replicas:
    """HTTP to the servers at `urls`.

    At most `concurrency` requests are in flight at a server; one that takes longer than `request_timeout` seconds has
    failed. When no server has worked for `outage_timeout` seconds, requests fail. `first` is where ties begin: clients
    that start together then begin with different servers. Errors begin with `key`, the section of the configuration.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api_key: str | None = None,
        concurrency: int = 64,
        request_timeout: float = 1800.0,
        outage_timeout: float = 600.0,
        first: int = 0,
        key: str = "rollout.sglang",
    ) -> None:
        first %= len(urls)
        self.replicas = [Replica(url) for url in (*urls[first:], *urls[:first])]
        self._concurrency, self._outage_timeout = concurrency, outage_timeout
        self._key = key
        self._working = time.monotonic()  # when a server was last known to work
        self._changed = asyncio.Event()  # set, and replaced, whenever a waiting request should look again
        self._open = asyncio.Event()  # not set while the servers are paused
        self._open.set()
        self._pauses = 0  # how many there were
        self._wanted = Wanted(ANY_WEIGHTS)  # by the last `run`
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(request_timeout, connect=CONNECT_TIMEOUT, pool=None),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE),
            trust_env=False,  # no proxy between the trainer and its servers
        )

    async def close(self) -> None:
        """Close all connections; what is still asked has failed."""
        probes = [replica.probe for replica in self.replicas if replica.probe is not None]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
        await self._http.aclose()

    async def run(
        self, requests: Sequence[Request[Result]], version: str, *, or_newer: bool = False
    ) -> list[Result]:
        """What `parse` makes of the answer of /generate to each (body, parse), in order.

        `parse` raises BadReply for what is no answer, Interrupted for the beginning of one. A server that has failed is
        asked again when its weights are those of `version`, see `Wanted`. Raises UserError when a server refuses a
        request, ATTEMPTS attempts of one have failed or no server works (WeightsLost when all that work have other
        weights); then the others are cancelled.
        """
        wanted = self._wanted = Wanted(version, or_newer)
        self._working = time.monotonic()
        for replica in self.replicas:
            replica.outdated = False
            if replica.trouble:
                self._probe_later(replica, wanted)
        tasks = [asyncio.create_task(self._ask(body, parse, wanted)) for body, parse in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def pause(self, *, tell: bool) -> None:
        """Send no requests until `resume`. With `tell` the servers stop drawing too: whatever anyone has asked them
        comes back as far as it has come.

        A server that does not confirm it may go on drawing, and its answers say with which weights. It rests if it does
        not confirm the end of the pause either: a pause that comes late is ended by that, for SGLang keeps the order.
        """
        self._open.clear()
        self._pauses += 1
        if not tell:
            return
        # By itself a pause looks once a second whether all requests have ended.
        await self.fetch_all("/abort_request", {"abort_all": True}, PROBE_TIMEOUT)
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                while any(replica.in_flight for replica in self.replicas):
                    await self._changed.wait()
        await self.fetch_all("/pause_generation", {"mode": "abort"}, PROBE_TIMEOUT)

    async def resume(self, *, tell: bool) -> None:
        """Send requests again, after `pause` with the same `tell`. A server that does not confirm that it goes on
        rests: it would keep requests until it is told again."""
        if tell:
            answers = await self.fetch_all("/continue_generation", {}, PROBE_TIMEOUT)
            for replica in self.replicas:
                answer = answers[replica.url]
                replica.stopped = isinstance(answer, BadReply | UserError)
                if replica.stopped:
                    self._rest(replica, f"it does not go on after a pause: {answer}", self._wanted)
        self._working = time.monotonic()
        for replica in self.replicas:
            replica.outdated = False  # as far as is known: a probe looks again
        self._open.set()
        self._look_again()

    async def fetch(self, url: str, path: str, body: Body = None, timeout: float | None = None) -> Any:
        """The JSON answer of one server to a POST of `body`, or to a GET without.

        Raises BadReply for a failure that may pass, and for an answer that takes longer than `timeout` seconds (None:
        `request_timeout`); UserError when the server refuses.
        """
        try:
            if body is None:
                response = await self._http.get(url + path, timeout=PROBE_TIMEOUT)
            else:
                limit = (
                    self._http.timeout if timeout is None else httpx.Timeout(timeout, connect=CONNECT_TIMEOUT)
                )
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                headers = {"Content-Type": "application/json"}
                response = await self._http.post(url + path, content=content, headers=headers, timeout=limit)
        except httpx.HTTPError as error:
            raise BadReply(str(error) or type(error).__name__) from None
        if response.status_code in (400, 401, 403, 404, 422):
            raise UserError(f"{self._key}: {url}{path} refuses ({response.status_code}): {_reason(response)}")
        if response.status_code != 200:
            raise BadReply(f"status {response.status_code}: {_reason(response)}")
        try:
            return response.json()
        except ValueError:
            if path.startswith("/flush_cache"):  # which SGLang answers in words
                return {"success": True, "message": response.text}
            raise BadReply(f"not JSON: {response.text[:80]!r}") from None

    async def fetch_each(
        self, path: str, bodies: Mapping[str, Body], timeout: float | None = None
    ) -> dict[str, Any]:
        """URL -> the answer of each server in `bodies`, asked at the same time, or what `fetch` raised.

        A server has `timeout` seconds to answer (None: `outage_timeout`).
        """
        limit = self._outage_timeout if timeout is None else timeout
        answers = await asyncio.gather(
            *(self.fetch(url, path, body, limit) for url, body in bodies.items()), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, BadReply | UserError):
                raise answer
        return dict(zip(bodies, answers, strict=True))

    async def fetch_all(self, path: str, body: Body = None, timeout: float | None = None) -> dict[str, Any]:
        """The same of all servers with one body."""
        bodies = dict.fromkeys((replica.url for replica in self.replicas), body)
        return await self.fetch_each(path, bodies, timeout)

    async def _ask(self, body: dict[str, Any], parse: Callable[[Any], Result], wanted: Wanted) -> Result:
        failed: Replica | None = None
        failures = 0
        pauses = self._pauses
        stalls: list[float] = []  # when answers came, in a row, that a stranger has left nothing of
        trouble = ""
        while failures < ATTEMPTS:
            await self._stand_back(stalls, trouble)
            replica = await self._least_loaded(but_not=failed)
            replica.in_flight += 1
            try:
                result = parse(await self.fetch(replica.url, "/generate", body))
                replica.failures = 0
                self._working = time.monotonic()
                return result
            except Interrupted as interrupted:
                body, parse = interrupted.request
                trouble = str(interrupted)
                wanted = replace(wanted, version=interrupted.version)
                self._working = time.monotonic()
                # Another rank's pause may be felt here before this one's own begins.
                ours, pauses = pauses != self._pauses, self._pauses
                stalls = [] if ours or interrupted.further else [*stalls, self._working]
            except BadReply as error:
                failures += 1
                trouble = str(error)
                self._rest(replica, trouble, wanted)
                failed = replica
            finally:
                replica.in_flight -= 1
                self._look_again()
        assert failed is not None
        raise Outage(
            f"{self._key}: {ATTEMPTS} attempts of one request failed, the last at {failed.url}: {trouble}"
        )

    async def _stand_back(self, stalls: Sequence[float], trouble: str) -> None:
        """Rest after answers that came to nothing at these times, longer with each; at last they are an error."""
        if len(stalls) > ATTEMPTS and stalls[-1] - stalls[0] > self._outage_timeout:
            raise Outage(
                f"{self._key}: a request has been aborted whenever it was sent for {self._outage_timeout:g} s, and not "
                f"by this run (the server says: {trouble}): see its log, and who else sends it /abort_request, then "
                "resume"
            )
        if stalls:
            await asyncio.sleep(rest_after(len(stalls)))

    async def _least_loaded(self, but_not: Replica | None) -> Replica:
        """A server with room; the one that has just failed only if there is no other. Waits for one."""
        while True:
            working = [replica for replica in self.replicas if not replica.trouble]
            free = [replica for replica in working if replica.in_flight < self._concurrency]
            paused = not self._open.is_set()
            if free and not paused:
                return min(free, key=lambda replica: (replica is but_not, replica.in_flight))
            outdated = any(replica.outdated for replica in self.replicas)
            patience = min(LOST_AFTER, self._outage_timeout) if outdated else self._outage_timeout
            left = None if working or paused else self._working + patience - time.monotonic()
            if left is not None and left <= 0:
                raise (WeightsLost if outdated else Outage)(self._outage(patience))
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()

    def _look_again(self) -> None:
        """Wake all requests that wait for a server."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _outage(self, seconds: float) -> str:
        troubles = "; ".join(f"{replica.url}: {replica.trouble}" for replica in self.replicas)
        return (
            f"{self._key}: none of {len(self.replicas)} servers has worked for {seconds:g} s "
            f"({troubles}): see their logs (run_dir/servers), then resume"
        )

    def _rest(self, replica: Replica, trouble: str, wanted: Wanted) -> None:
        """Give the server no requests until a probe succeeds; requests that fail together count once."""
        if not replica.trouble:
            self._working = time.monotonic()  # until now it did
            replica.trouble = trouble
            replica.failures += 1
            self._probe_later(replica, wanted)

    def _probe_later(self, replica: Replica, wanted: Wanted) -> None:
        if replica.probe is not None:
            replica.probe.cancel()
        replica.probe = asyncio.create_task(self._probe(replica, wanted))

    async def _probe(self, replica: Replica, wanted: Wanted) -> None:
        """Wait until the server generates and has the weights, then let it have requests again."""
        tries = max(1, replica.failures)
        while replica.trouble:
            await asyncio.sleep(rest_after(tries))
            await self._open.wait()  # a paused server does not generate
            replica.outdated, replica.trouble = await self._state_of(replica, wanted)
            tries += 1
            self._look_again()

    async def _state_of(self, replica: Replica, wanted: Wanted) -> tuple[bool, str]:
        """Whether the server generates with other weights, and why it cannot be asked; empty when it can."""
        url = replica.url
        try:
            if replica.stopped:  # only then: a pause of somebody else's is not ended
                await self.fetch(url, "/continue_generation", {}, PROBE_TIMEOUT)
                replica.stopped = False
            health = await self._http.get(url + "/health", timeout=PROBE_TIMEOUT)
            if health.status_code != 200:
                return False, f"its health check says {health.status_code}"
            info = await self.fetch(url, "/model_info")
        except (httpx.HTTPError, BadReply, UserError) as error:
            return False, str(error) or type(error).__name__
        found = info.get("weight_version") if isinstance(info, dict) else None
        if wanted.suits(found):
            return False, ""
        return True, f"it has the weights {found!r} instead of {wanted.version!r}"


def rest_after(times: int) -> float:
    """Seconds to wait after the `times`-th failure in a row, somewhat random."""
    return min(LONGEST_REST, FIRST_REST * 2 ** min(times - 1, 10)) * random.uniform(0.75, 1.25)


def _reason(response: httpx.Response) -> str:
    """SGLang's message in an error reply, whichever of its forms it has."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:200]
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)[:200]
