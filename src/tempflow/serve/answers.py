"""Which requests are at work, and answers of those that are done: what comes again is not scored again."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class Busy(Exception):
    """No request is taken at the moment."""


class Gate:
    """How many requests are there at a time, and how many bytes of memory they take.

    requests  most requests
    memory    most bytes; a request that is alone may take more
    """

    def __init__(self, requests: int, memory: int) -> None:
        self.requests, self.memory = requests, memory
        self.inside = self.used = 0

    @contextmanager
    def entered(self) -> Iterator[Lease]:
        """Around a request. Raises Busy where there are too many."""
        if self.inside >= self.requests:
            raise Busy(f"{self.inside} requests are at work")
        lease = Lease(self)
        self.inside += 1
        try:
            yield lease
        finally:
            self.inside -= 1
            self.used -= lease.taken


@dataclass
class Lease:
    """The memory of one request."""

    gate: Gate
    taken: int = 0

    def take(self, size: int) -> None:
        """Raises Busy where there isn't so much left."""
        gate = self.gate
        if gate.inside > 1 and gate.used + size > gate.memory:
            raise Busy(f"requests of {gate.used} bytes are at work")
        self.taken += size
        gate.used += size


class Conflict(ValueError):
    """An idempotency key that came with another request before."""


@dataclass(frozen=True)
class _Kept:
    print: bytes
    work: asyncio.Task[bytes]
    since: float


class Answers:
    """Answers by idempotency key, for requests that come again: what is at work is joined, what is done is repeated.

    What failed is forgotten, so that it is tried again. What is done is kept for `seconds`, at most `count` answers and
    `size` bytes of them, the oldest are forgotten first.
    """

    def __init__(self, count: int = 4096, size: int = 64 << 20, seconds: float = 600.0) -> None:
        self.count, self.size, self.seconds = count, size, seconds
        self.repeated = 0
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    async def once(self, key: str, fingerprint: bytes, work: Callable[[], Awaitable[bytes]]) -> bytes:
        """What `work` returns, or what it did for the same key before. Raises Conflict where that was another request,
        and what `work` raises. It goes on where the one who waits has gone."""
        self._forget()
        kept = self._kept.get(key)
        if kept is not None and kept.print != fingerprint:
            raise Conflict(f"idempotency key {key!r} came with another request before; nearest valid: a new key")
        if kept is None:
            kept = self._kept[key] = _Kept(fingerprint, asyncio.ensure_future(_run(work)), time.monotonic())
            kept.work.add_done_callback(lambda done: self._done(key, done))
        else:
            self.repeated += 1
        return await asyncio.shield(kept.work)

    def _done(self, key: str, work: asyncio.Task[bytes]) -> None:
        if work.cancelled() or work.exception() is not None:
            del self._kept[key]
        else:
            self._bytes += len(work.result())

    def _forget(self) -> None:
        """The oldest that are done, as far as there are too many."""
        now = time.monotonic()
        for key, kept in [*self._kept.items()]:
            if len(self._kept) < self.count and self._bytes <= self.size and now - kept.since <= self.seconds:
                break
            if kept.work.done():
                del self._kept[key]
                self._bytes -= len(kept.work.result())


async def _run(work: Callable[[], Awaitable[bytes]]) -> bytes:
    return await work()
