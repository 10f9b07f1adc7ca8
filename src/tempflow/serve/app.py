"""A reward behind HTTP: who may ask, what is read, what is answered. docs/reward_server.md says it for users."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException as Refused
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tempflow.media import Media, serves
from tempflow.rewards import wire
from tempflow.rewards.protocol import Reward
from tempflow.rewards.safe import safe
from tempflow.rewards.wire import CONTENT, LENGTH, About, Answer, Head, Limits
from tempflow.serve.answers import Answers, Busy, Conflict, Gate, Lease
from tempflow.serve.batch import Batcher, Job, Stopped

RETRY_AFTER = 1
"""Seconds after which who is refused for want of room should ask again."""

KEY = Annotated[
    str | None,
    Header(min_length=8, max_length=128, pattern=r"^[\x21-\x7e]+$", description="names this request; see below"),
]


@dataclass(frozen=True)
class Settings:
    """How a server works.

    limits    what a request may hold
    batch     most rows of a call that joins requests; 1 joins none
    latency   seconds that a request waits for others
    timeout   seconds that a call of the reward may take
    upload    seconds that a request's body may take to arrive
    requests  most requests at a time; more are answered 429
    memory    most bytes of requests and decoded media at a time
    """

    limits: Limits
    batch: int = 16
    latency: float = 0.005
    timeout: float = 600.0
    upload: float = 60.0
    requests: int = 64
    memory: int = 2 << 30


def make_app(reward: Reward, token: str, settings: Settings) -> FastAPI:
    """The server of `reward`, for whoever knows `token`. A thread of it calls the reward until it is stopped."""
    server = Server(reward, token, settings)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        server.batcher.stop()

    app = FastAPI(
        title="tempflow reward server",
        version=str(wire.VERSION),
        description=f"Scores media by the reward {reward.name!r}. A score that failed is null; it is never 0.",
        docs_url=None,  # these pages would load scripts from elsewhere
        redoc_url=None,
        lifespan=life,
    )
    may = [Depends(server.authorised)]
    refusals: dict[int | str, dict[str, Any]] = {code: {"description": text} for code, text in REFUSALS.items()}
    add = app.add_api_route
    add("/health", server.health, summary="Whether the server is there; needs no token")
    add("/metrics", server.metrics, dependencies=may, response_class=PlainTextResponse, summary="For Prometheus")
    add("/v1/reward", server.about, dependencies=may, response_model=About, summary="What the server scores by")
    add(
        "/v1/score",
        server.score,
        methods=["POST"],
        dependencies=may,
        response_model=Answer,
        responses=refusals,
        summary="Scores media",
        description=DESCRIPTION,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {CONTENT: {"schema": {"type": "string", "format": "binary", "description": DESCRIPTION}}},
            },
            "x-head": Head.model_json_schema(),
        },
    )
    add(
        "/v1/prompts",
        server.prompts,
        methods=["POST"],
        dependencies=may,
        responses=refusals,
        summary="Whether the reward can judge prompts; 422 says which it cannot",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": wire.Prompts.model_json_schema()}},
            }
        },
    )
    app.add_exception_handler(Refused, _refusal)
    app.add_exception_handler(RequestValidationError, _refusal)
    app.add_middleware(Counted, statuses=server.statuses)
    return app


DESCRIPTION = (
    "The body: the head's length (4 bytes, little endian), the head (JSON, schema `x-head`), and the bodies that the "
    "head announces, one after the other. A request with an Idempotency-Key that came before gets the same answer, or "
    "joins the one that is at work; it is not scored twice."
)

REFUSALS = {
    400: "no request of this version",
    401: "no token, or another",
    408: "the body took too long to arrive",
    409: "the idempotency key came with another request before",
    413: "larger than the limits that /v1/reward tells",
    415: f"the content type is not {CONTENT}",
    422: "media or prompts that this reward does not take",
    429: "too many requests at a time; Retry-After says when to ask again",
    503: "the server stops",
}


async def _refusal(request: Request, error: Exception) -> Response:
    """All refusals alike: one line under "error"."""
    if isinstance(error, Refused):
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    return JSONResponse({"error": f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"}, 400)


@contextmanager
def _refusing() -> Iterator[None]:
    """What is wrong with a request, as its answer."""
    try:
        yield
    except Busy as error:
        raise _refuse(429, error) from None
    except Stopped as error:
        raise _refuse(503, error) from None
    except Conflict as error:
        raise _refuse(409, error) from None
    except wire.TooLarge as error:
        raise _refuse(413, error) from None
    except wire.WireError as error:
        raise _refuse(400, error) from None


class Counted:
    """Counts the answers of an app by their status."""

    def __init__(self, app: ASGIApp, statuses: Counter[int]) -> None:
        self.app, self.statuses = app, statuses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
            await send(message)

        await self.app(scope, receive, counted)


def _refuse(status: int, why: object) -> HTTPException:
    headers = {"Retry-After": str(RETRY_AFTER)} if status in (429, 503) else None
    return HTTPException(status, " ".join(str(why).split()), headers)


class Server:
    """What the routes of an app share."""

    def __init__(self, reward: Reward, token: str, settings: Settings) -> None:
        self.settings, self._token = settings, token.encode()
        self.reward = safe(reward, settings.timeout)
        self.batcher = Batcher(self.reward, settings.batch, settings.latency)
        self.gate = Gate(settings.requests, settings.memory)
        self.answers = Answers()
        self.codecs: tuple[wire.Codec, ...] = ("png", "raw", "ffv1") if wire.has_ffv1() else ("png", "raw")
        self.statuses: Counter[int] = Counter()
        self.received = 0

    # ------------------------------------------------------------------------------------------------------- routes
    def authorised(
        self, given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
    ) -> None:
        """Looks at the token before anything of a body is read."""
        said = b"" if given is None else given.credentials.encode()
        if not secrets.compare_digest(said, self._token):  # which takes as long for any other token
            raise HTTPException(401, "a bearer token is needed, and this is none", {"WWW-Authenticate": "Bearer"})

    async def health(self) -> dict[str, str]:
        return {"status": "ok", "version": str(wire.VERSION)}

    async def about(self) -> About:
        return About.model_validate(
            {
                "version": wire.VERSION,
                "reward": self.reward.name,
                "columns": self.batcher.columns,
                "groupwise": self.reward.groupwise,
                "takes": self.reward.takes,
                "codecs": self.codecs,
                "limits": self.settings.limits,
            }
        )

    async def metrics(self) -> str:
        """Counters and gauges as Prometheus reads them."""
        b = self.batcher
        counters = {
            "bytes_received": self.received,
            "scorer_calls": b.calls,
            "scorer_seconds": b.seconds,
            "joined_requests": b.joined,
            "repeated_requests": self.answers.repeated,
            'rows{result="scored"}': b.scored,
            'rows{result="failed"}': b.failed,
        } | {f'requests{{status="{status}"}}': count for status, count in sorted(self.statuses.items())}
        gauges = {
            "requests_at_work": self.gate.inside,
            "bytes_at_work": self.gate.used,
            "rows_waiting": b.queued,
            "answers_kept": len(self.answers),
        }
        lines: list[str] = []
        for kind, found in (("counter", counters), ("gauge", gauges)):
            typed = set[str]()
            for name, value in found.items():
                plain, _, label = name.partition("{")
                full = f"tempflow_reward_{plain}" + ("_total" if kind == "counter" else "")
                lines += [f"# TYPE {full} {kind}"] if full not in typed else []
                lines.append(f"{full}{'{' + label if label else ''} {value:g}")
                typed.add(full)
        return "\n".join(lines) + "\n"

    async def prompts(self, request: Request) -> dict[str, str]:
        """Asks the reward, before a run, whether it can judge these prompts."""
        body = bytearray()
        with _refusing(), self.gate.entered() as lease:
            async for chunk in self._chunks(request, lease, wire.MAX_HEAD):
                body += chunk
            found = await asyncio.to_thread(wire.read_prompts, body)
            try:
                await asyncio.to_thread(self.reward.check_prompts, found.prompts, found.metadata)
            except Exception as error:
                raise _refuse(422, error) from None
        return {"status": "ok"}

    async def score(self, request: Request, idempotency_key: KEY = None) -> Response:
        """Reads a request as far as it is allowed, and answers with its scores."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != CONTENT:
            raise _refuse(415, f"content type {kind[:80]!r}; nearest valid: {CONTENT!r}")
        with _refusing(), self.gate.entered() as lease:
            head, body, start = await self._read(request, lease)
            lease.take(_decoded(head))
            if idempotency_key is None:
                answer = await self._answer(head, body, start)
            else:
                fingerprint = await asyncio.to_thread(lambda: hashlib.sha256(body).digest())
                work = partial(self._answer, head, body, start)
                answer = await self.answers.once(idempotency_key, fingerprint, work)
        return Response(answer, media_type="application/json")

    # ------------------------------------------------------------------------------------------------ one request
    async def _read(self, request: Request, lease: Lease) -> tuple[Head, bytearray, int]:
        """The head, the whole body, and where in it the bodies begin. Reads no more than the head announces."""
        limits = self.settings.limits
        body, start, size, head = bytearray(), LENGTH.size, limits.bytes, None
        async for chunk in self._chunks(request, lease, limits.bytes):
            body += chunk
            if start == LENGTH.size and len(body) >= start:
                start = wire.head_size(body, limits)
            if head is None and len(body) >= start > LENGTH.size:
                head = await asyncio.to_thread(wire.read_head, bytes(body[:start]), limits)
                self._check(head)
                size = start + sum(head.bodies)
            if len(body) > size:
                raise wire.WireError(f"more than the {size} bytes that the head announces")
        if head is None or len(body) < size:
            raise wire.WireError(f"{len(body)} bytes, which is less than {'the head' if head else 'a head'} announces")
        return head, body, start

    async def _chunks(self, request: Request, lease: Lease, most: int) -> AsyncIterator[bytes]:
        """A body as it comes: not too much of it, and not for too long."""
        told, size = request.headers.get("content-length", ""), 0
        if told.isdigit() and int(told[:20]) > most:
            raise wire.TooLarge(f"a request of {told[:20]} bytes; nearest valid: at most {most}")
        chunks, until = request.stream(), asyncio.get_running_loop().time() + self.settings.upload
        while True:
            try:
                async with asyncio.timeout_at(until):
                    chunk = await anext(chunks, None)
            except ClientDisconnect:
                raise _refuse(400, "who asks has gone") from None
            except TimeoutError:
                raise _refuse(408, f"the body took longer than {self.settings.upload:g} s") from None
            if chunk is None:
                return
            size += len(chunk)
            if size > most:
                raise wire.TooLarge(f"a request of {size} bytes or more; nearest valid: at most {most}")
            self.received += len(chunk)
            lease.take(len(chunk))
            yield chunk

    def _check(self, head: Head) -> None:
        """Whether the reward takes such media, before they are read."""
        if head.media.codec not in self.codecs:
            raise _refuse(422, f"codec {head.media.codec!r} is not installed here; nearest valid: 'png'")
        made = "video and sound" if head.media.sound else "picture" if head.media.frames == 1 else "video"
        if not serves(made, self.reward.takes):
            raise _refuse(422, f"media are {made}; the reward {self.reward.name!r} takes {self.reward.takes}")
        if self.reward.groupwise and len(set(head.prompts)) > 1:
            raise _refuse(422, f"the reward {self.reward.name!r} compares media of one prompt; nearest valid: one")

    async def _answer(self, head: Head, body: bytearray, start: int) -> bytes:
        """Scores, as JSON."""
        media = await asyncio.to_thread(_media, head, body, start)
        scored = await asyncio.wrap_future(self.batcher.submit(Job(media, head.prompts, head.metadata)))
        return wire.answer_of(self.reward.name, scored.scores, scored.reasons).model_dump_json().encode()


def _decoded(head: Head) -> int:
    """Bytes of a request's media in memory."""
    form, rows = head.media, len(head.prompts)
    sound = form.sound.channels * form.sound.samples * 4 if form.sound else 0
    return rows * (form.frames * form.height * form.width * 3 + sound)


def _media(head: Head, body: bytearray, start: int) -> Media:
    return wire.read_media(head, memoryview(body)[start:])
