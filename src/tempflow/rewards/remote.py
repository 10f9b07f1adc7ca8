"""A reward that another process computes (`tempflow serve-reward`) and this one asks for: docs/reward_server.md."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sys
import time
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import urlsplit

import torch
from pydantic import Field

from tempflow.core.scores import Scores
from tempflow.media import Kind, Media
from tempflow.names import cut
from tempflow.rewards import wire
from tempflow.rewards.protocol import Reward, Unreachable, check_media
from tempflow.rewards.sources import parted
from tempflow.rewards.wire import CONTENT, MAX_ANSWER, MAX_HEAD, UNSCORED, About, Answer, Codec, WireError

if TYPE_CHECKING:
    import httpx

LICENCE, NEEDS, RANGE = "as served", "tempflow[remote]", "as served"

TOKEN = "TEMPFLOW_REWARD_TOKEN"

BASE, MOST = 0.25, 16.0
"""Seconds before the second try, at most, and before a late one; the wait is drawn from 0 to that (full jitter)."""

TRIPS = 3
"""Failures in a row after which a server is left alone for a while."""

PAUSE, LONGEST = 5.0, 60.0
"""Seconds that it is left alone, at first and at most; they double. Then one request tries it."""

CHECKED = 1000
"""Prompts that are checked in a request."""

SOURCE_BYTES = MAX_HEAD // 4 * 3
"""Of the source pictures that a request holds, each once; the rest of its head is for prompts and metadata."""

HELLO = 3
"""Tries to reach a server before a run."""

MOST_TOLD = 20
"""Different reasons that are told as warnings."""

RETRIED = (408, 429)
"""Statuses, beside 5xx, after which a request is sent again."""

Part = tuple[Media, Sequence[str], Sequence[Mapping[str, object]]]
"""What one request asks about."""

T = TypeVar("T")

_log = logging.getLogger(__name__)


def remote(
    *,
    url: str | tuple[str, ...],
    reward: str = "",
    groupwise: bool = False,
    takes: Kind = "picture",
    codec: Codec = "png",
    batch: Annotated[int, Field(ge=1, le=65_536)] = 16,
    concurrency: Annotated[int, Field(ge=1, le=256)] = 4,
    timeout: Annotated[float, Field(gt=0, le=86_400)] = 120.0,
    deadline: Annotated[float, Field(gt=0, le=86_400)] = 600.0,
    retries: Annotated[int, Field(ge=0, le=1000)] = 8,
    token_file: str = "",
    token_env: str = TOKEN,
) -> Reward:
    """The scores of a reward server, or of several that serve the same reward.

    url          of the server, or of several, which share the requests
    reward       what the server must say that it serves; "" takes any
    groupwise    what it must say that it is; a run has to know before it asks
    takes        likewise
    codec        how frames travel: "png", "raw" (larger, no work) or "ffv1" (clips); each keeps every bit
    batch        media of a request; they are the batches of the scorer, so that scores do not depend on other requests
    concurrency  requests at a time
    timeout      seconds of one try
    deadline     seconds of a call, with all its requests and tries
    retries      tries of a request after the first, if a server fails; one that is busy is asked until the deadline
    token_file   file with the token; "": the environment variable that `token_env` names

    Raises ValueError for a URL that is none or holds a secret, and where there is no token; ImportError without httpx.
    """
    urls = (url,) if isinstance(url, str) else url
    try:
        import httpx  # noqa: F401
    except ImportError as error:
        raise ImportError("the reward remote needs httpx: pip install 'tempflow[remote]'", name="httpx") from error
    if codec == "ffv1" and not wire.has_ffv1():
        raise ImportError("codec: 'ffv1' needs PyAV: pip install 'tempflow[video]'", name="av")
    servers = tuple(_Server(_checked(one)) for one in urls)
    if not servers or len({server.url for server in servers}) != len(servers):
        raise ValueError(f"url: {len(servers)} of them, not all different; nearest valid: each server once")
    how = _How(codec, batch, concurrency, timeout, deadline, retries)
    return Remote(servers, _token(token_file, token_env), how, reward, groupwise, takes)


@dataclass(frozen=True)
class _How:
    """See `remote`."""

    codec: Codec
    batch: int
    concurrency: int
    timeout: float
    deadline: float
    retries: int


@dataclass
class _Server:
    """One of the servers, and how it does.

    failures    in a row
    not_before  time.monotonic() before which it is not asked
    at_work     requests that it has
    """

    url: str
    failures: int = 0
    not_before: float = 0.0
    at_work: int = 0

    def ready(self, now: float) -> bool:
        """Whether it may be asked. One that failed often is asked by one request at a time until it answers."""
        return now >= self.not_before and (self.failures < TRIPS or not self.at_work)

    def failed(self) -> None:
        self.failures += 1
        if self.failures >= TRIPS:
            self.not_before = time.monotonic() + min(LONGEST, PAUSE * 2 ** (self.failures - TRIPS))


class _Failed(Exception):
    """A try that may be made again. `wait`: seconds that the server asks for, None where it failed."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class Refused(Unreachable):
    """A server that will not answer this, however often it is asked."""

    def __init__(self, why: str, status: int) -> None:
        super().__init__(why)
        self.status = status


class Remote:
    """See `remote`. A score that the server says has failed is failed, and so are all of a request that no server
    answers, or answers wrongly; the reasons are logged, each once. Nothing becomes 0.

    Raises `Unreachable`, with the first reason, where a call has no score because of servers or of what they raised.
    """

    name = "remote"

    def __init__(
        self, servers: Sequence[_Server], token: str, how: _How, reward: str, groupwise: bool, takes: Kind
    ) -> None:
        self.servers, self.how, self.reward = servers, how, reward
        self.groupwise, self.takes = groupwise, takes
        self.about: About | None = None
        self._token = token
        self._served: tuple[str, ...] | None = None
        self._told: set[str] = set()
        self._lock = Lock()
        self._jitter = random.Random()  # of its own: the global one is the run's

    def prepare(self) -> None:
        """Asks all servers what they serve. Raises Unreachable for one that does not answer, ValueError for one that
        serves something else than is asked for, or than the others."""
        with self._lock:
            if self.about is None:
                self.about = _run(self._greet())
                self._served = self.about.columns

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None:
        """Asks the first server whether its reward can judge them. Raises ValueError for a prompt that it cannot."""
        said = [(prompts[at : at + CHECKED], metadata[at : at + CHECKED]) for at in range(0, len(prompts), CHECKED)]
        _run(self._check_all([wire.pack_prompts(*part) for part in said]))

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        """The server's columns; the one that bears its reward's name is called "remote"."""
        media = check_media(media, prompts, metadata)
        self.prepare()
        size, most = (len(media), sys.maxsize) if self.groupwise else (self._rows(media), SOURCE_BYTES)
        parts = [*parted(metadata, size, most)]
        asked = [(media[part], prompts[part], metadata[part]) for part in parts]
        answers = _run(self._ask_all(asked)) if asked else []
        return self._joined(answers, [len(m) for m, _, _ in asked])

    def _rows(self, media: Media) -> int:
        """Media of a request: as many as are asked for, as far as the servers take them."""
        assert self.about is not None
        limits, (_, frames, height, width, _) = self.about.limits, media.frames.shape
        pixels = frames * height * width
        sound = 0 if media.sound is None else media.sound[0].numel() * 4
        fits = min(limits.rows, limits.pixels // pixels, limits.bytes // (3 * pixels + sound))
        return max(1, min(self.how.batch, fits))

    def _joined(self, answers: Sequence[Scores | str], sizes: Sequence[int]) -> Scores:
        """All rows; those of requests that failed are failed."""
        found = [answer for answer in answers if isinstance(answer, Scores)]
        faults = [answer for answer in answers if isinstance(answer, str)]
        for fault in faults:
            self._tell(fault)
        if faults and not found:
            raise Unreachable(faults[0])
        names = self._own(self._served) if self._served else found[0].names if found else (self.name,)
        parts = [
            answer if isinstance(answer, Scores) and answer.names == names else _failed(size, names)
            for answer, size in zip(answers, sizes, strict=True)
        ]
        return Scores.cat(parts) if parts else _failed(0, names)

    def _tell(self, why: str) -> None:
        quiet = why in self._told or len(self._told) >= MOST_TOLD
        self._told |= set() if quiet else {why}
        _log.log(logging.DEBUG if quiet else logging.WARNING, "reward %r: %s; such scores are failed", self.name, why)

    # ------------------------------------------------------------------------------------------------------ servers
    async def _greet(self) -> About:
        async with self._client() as client:
            told = [await self._about(client, server) for server in self.servers]
        first = told[0]
        for server, about in zip(self.servers, told, strict=True):
            for field, found, asked in (
                ("reward", about.reward, self.reward or first.reward),
                ("groupwise", about.groupwise, self.groupwise),
                ("takes", about.takes, self.takes),
            ):
                if found != asked:
                    told = f"{server.url} serves {field} {found!r}, and {asked!r} is asked for"
                    raise ValueError(f"{field}: {told}; nearest valid: {found!r}")
            if self.how.codec not in about.codecs:
                raise ValueError(f"codec: {server.url} does not take {self.how.codec!r}; nearest valid: 'png'")
        least = {field: min(getattr(about.limits, field) for about in told) for field in ("rows", "bytes", "pixels")}
        return first.model_copy(update={"limits": wire.Limits.model_validate(least)})

    async def _check_all(self, bodies: Sequence[bytes]) -> None:
        async with self._client() as client:
            for body in bodies:
                try:
                    await self._before(client, self.servers[0], "POST", "/v1/prompts", body)
                except Refused as error:
                    raise ValueError(str(error)) if error.status == 422 else error from None

    async def _about(self, client: httpx.AsyncClient, server: _Server) -> About:
        return wire.parse(About, await self._before(client, server, "GET", "/v1/reward"), server.url)

    async def _before(
        self, client: httpx.AsyncClient, server: _Server, method: str, path: str, body: bytes | None = None
    ) -> bytes:
        """What a server answers before a run, in a few tries. Raises Unreachable."""
        for number in range(1, HELLO + 1):
            try:
                return await self._try(client, server, method, path, min(self.how.timeout, 30.0), body)
            except _Failed as error:
                if number == HELLO:
                    server.failures = 0  # the run's own calls begin anew
                    raise Unreachable(f"url: {error}") from None
                await asyncio.sleep(self._wait(number))
        raise AssertionError

    async def _ask_all(self, asked: Sequence[Part]) -> list[Scores | str]:
        """Of each request its scores, or why there are none."""
        until, at_once = time.monotonic() + self.how.deadline, asyncio.Semaphore(self.how.concurrency)

        async with self._client() as client:

            async def ask(part: Part) -> Scores | str:
                async with at_once:
                    try:
                        body = await asyncio.to_thread(wire.pack, *part, self.how.codec)
                        return self._scores(await self._ask(client, body, until), len(part[0]))
                    except (WireError, Unreachable) as error:
                        return str(error)

            return await asyncio.gather(*(ask(part) for part in asked))

    def _scores(self, data: bytes, rows: int) -> Scores:
        """An answer's scores. Raises WireError for an answer to something else."""
        assert self.about is not None
        answer = wire.parse(Answer, data, "answer")
        if answer.reward != self.about.reward:
            raise WireError(f"answer: of reward {cut(answer.reward)!r}; expected {self.about.reward!r}")
        scores = wire.scores_of(answer, rows, self._served)
        for reason in dict.fromkeys(reason for reason in answer.reasons if reason not in (None, UNSCORED)):
            self._tell(f"the server says: {cut(str(reason), 300)}")
        if not scores.ok.any() and all(reason != UNSCORED for reason in answer.reasons):
            raise Unreachable(f"the server says: {cut(str(answer.reasons[0]), 300)}")
        if scores.ok.any():
            self._served = scores.names
        return Scores(scores.value, scores.ok, self._own(scores.names))

    def _own(self, served: Sequence[str]) -> tuple[str, ...]:
        """What the served columns are called here."""
        assert self.about is not None
        return tuple(self.name if name == self.about.reward else name for name in served)

    async def _ask(self, client: httpx.AsyncClient, body: bytes, until: float) -> bytes:
        """What some server answers. Raises Unreachable where none does in time, or one refuses."""
        key, failures, why = uuid.uuid4().hex, 0, ""
        while True:
            server = await self._turn(until, why)
            left = until - time.monotonic()
            try:
                return await self._try(client, server, "POST", "/v1/score", min(self.how.timeout, left), body, key)
            except _Failed as error:
                why = str(error)
                if error.wait is None:
                    failures += 1
                    if failures > self.how.retries:
                        raise Unreachable(f"{why}, after {failures} tries") from None
                    await asyncio.sleep(min(self._wait(failures), max(0.0, until - time.monotonic())))

    async def _turn(self, until: float, why: str) -> _Server:
        """The server to ask next, when it may be asked. Raises Unreachable where none may in time."""
        while True:
            now = time.monotonic()
            ready = [server for server in self.servers if server.ready(now)]
            soonest = min((server.not_before for server in self.servers), default=now)
            if now >= until or (not ready and soonest >= until):
                raise Unreachable(f"{why or 'no server may be asked'}; the call's {self.how.deadline:g} s are over")
            if ready:
                return min(ready, key=lambda server: (server.at_work, server.failures))
            await asyncio.sleep(min(max(soonest - now, 0.02), until - now))

    async def _try(
        self,
        client: httpx.AsyncClient,
        server: _Server,
        method: str,
        path: str,
        seconds: float,
        body: bytes | None = None,
        key: str | None = None,
    ) -> bytes:
        """One request's answer. Raises _Failed where it may be made again, Unreachable where that is of no use."""
        import httpx

        headers = {"Authorization": f"Bearer {self._token}", "Accept-Encoding": "identity"}
        if body is not None:
            headers["Content-Type"] = CONTENT if key is not None else "application/json"
        if key is not None:
            headers["Idempotency-Key"] = key
        server.at_work += 1
        try:
            async with asyncio.timeout(seconds):
                request = client.build_request(method, server.url + path, content=body, headers=headers)
                response = await client.send(request, stream=True)
                try:
                    data = await _read(response)
                finally:
                    await response.aclose()
        except TimeoutError:
            server.failed()
            raise _Failed(f"{server.url} did not answer in {seconds:.3g} s") from None
        except (httpx.TransportError, OSError) as error:
            server.failed()
            raise _Failed(f"{server.url}: {type(error).__name__}: {cut(str(error), 200)}") from None
        finally:
            server.at_work -= 1
        status = response.status_code
        if status == 200:
            server.failures = 0
            return data
        why = f"{server.url} answers {status}: {_said(data)}"
        if status not in RETRIED and status < 500:
            raise Refused(why, status)
        wait = _retry_after(response.headers.get("retry-after"))
        if wait is None and status != 429:
            server.failed()
        else:
            wait = (wait or 0.0) + self._wait(1)  # many clients are told the same time
            server.not_before = max(server.not_before, time.monotonic() + wait)
        raise _Failed(why, wait)

    def _client(self) -> httpx.AsyncClient:
        import httpx

        local = all(urlsplit(server.url).hostname in ("127.0.0.1", "localhost", "::1") for server in self.servers)
        plain = all(server.url.startswith("http:") for server in self.servers)
        limits = httpx.Limits(max_connections=None)
        # Nothing on this machine is asked through a proxy, whatever the environment says. Times are ours.
        return httpx.AsyncClient(trust_env=not local, verify=not plain, timeout=None, limits=limits)

    def _wait(self, failures: int) -> float:
        """Full jitter."""
        return self._jitter.uniform(0.0, min(MOST, BASE * 2 ** min(failures - 1, 16)))


async def _read(response: httpx.Response) -> bytes:
    """An answer of at most `MAX_ANSWER` bytes, as it is sent: nothing is unpacked."""
    data = bytearray()
    async for chunk in response.aiter_raw():
        data += chunk
        if len(data) > MAX_ANSWER:
            raise Unreachable(f"{response.url} answers more than {MAX_ANSWER} bytes")
    return bytes(data)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """In an event loop of its own; in another thread where this one runs one already, as notebooks do."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def _failed(rows: int, names: tuple[str, ...]) -> Scores:
    shape = (rows, len(names))
    return Scores(torch.full(shape, float("nan")), torch.zeros(shape, dtype=torch.bool), names)


def _said(data: bytes) -> str:
    """What a server says is wrong."""
    text = data[:2000].decode("utf-8", "replace")
    return cut(text.removeprefix('{"error":"').removesuffix('"}'), 300) or "nothing more"


def _retry_after(value: str | None) -> float | None:
    """Seconds that a server asks for, as a number or a date; None where it does not say."""
    if value is None:
        return None
    try:
        return max(0.0, float(value)) if value.strip().isdigit() else max(0.0, _seconds_to(value))
    except (ValueError, OverflowError):
        return None


def _seconds_to(date: str) -> float:
    return parsedate_to_datetime(date).timestamp() - time.time()


def _checked(url: str) -> str:
    """A URL without its last slash. Raises ValueError for one that is none, or that holds a password or a query."""
    import httpx

    try:
        httpx.URL(url)
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (ValueError, httpx.InvalidURL):
        fits, parts = False, urlsplit("")
    if not fits or parts.query or parts.fragment:
        raise ValueError(f"url: {cut(url)!r} is no address of a server; nearest valid: 'http://127.0.0.1:8000'")
    if parts.username or parts.password:
        raise ValueError("url: holds a name or a password; nearest valid: none there, and the token in a file")
    return url.rstrip("/")


def _token(file: str, variable: str) -> str:
    """From a file, or else the environment. Raises ValueError where it is in neither."""
    if file:
        try:
            found = Path(file).expanduser().read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "no ASCII text"
            raise ValueError(f"token_file: {cut(file)!r} cannot be read ({why})") from error
    else:
        found = os.environ.get(variable, "").strip()
    if not found or not found.isprintable() or not found.isascii():
        where = f"token_file: {cut(file)!r} holds none" if file else f"token_env: {cut(variable)!r} holds none"
        raise ValueError(f"{where}; nearest valid: the token that `tempflow serve-reward` tells")
    return found
