"""Asking a judge behind an OpenAI-style endpoint: what goes over the wire, what comes back, and what is kept on disk.

A question that gets no certain answer is failed: None, never a number. What will not mend by itself (a refused key, an
unknown model) raises RewardError, which ends a run.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from torch import Tensor

from tempflow.rewards.answers import Unreadable
from tempflow.rewards.protocol import RewardError
from tempflow.rewards.sources import encoded
from tempflow.rewards.template import Answer

if TYPE_CHECKING:
    from openai import OpenAI

KEY = "TEMPFLOW_JUDGE_KEY"
"""The environment variable that usually holds an endpoint's key. Not OPENAI_API_KEY: a key that lies about for other
uses would go to whatever address a configuration names."""

LONGEST = 4 << 20
"""Bytes of a response that are read."""

FINAL = (401, 403, 404)
"""Statuses that asking again will not change, whatever is asked: no right, or no such model or address."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A text, and the pictures that go before it, in order, as PNG."""

    text: str
    pictures: tuple[bytes, ...]


@dataclass(frozen=True)
class Settings:
    """Where a judge is and how it is asked. Temperature is 0 always.

    url          of the interface's root, such as http://127.0.0.1:8000/v1
    model        as the endpoint calls it
    version      of the template, part of the cache's key
    by_tokens    ask for the first token's probabilities, and for no more than that token
    key_env      environment variable that holds the key; one that is not set means that the endpoint needs none
    timeout      seconds that an attempt may take
    retries      attempts after the first, on 408, 409, 429, 5xx and broken connections, as Retry-After says
    concurrency  questions on the way at a time
    max_tokens   of an answer; one that is cut there is failed
    top          how many of the first token's likeliest are asked for
    cache        folder for answers; "" keeps none

    Raises ValueError for a url that is none or holds a password, and for a `key_env` that is no variable's name.
    """

    url: str
    model: str
    version: int
    by_tokens: bool
    key_env: str = KEY
    timeout: float = 120.0
    retries: int = 4
    concurrency: int = 16
    max_tokens: int = 2048
    seed: int = 0
    top: int = 20
    cache: str = ""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url: {self.url[:60]!r} is no address; nearest valid: 'http://127.0.0.1:8000/v1'")
        if parts.password is not None or parts.query:
            raise ValueError(f"url: it holds a password or a query; nearest valid: without, and the key in ${KEY}")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):
            # what stands there may be the key itself, so it is not shown
            raise ValueError(f"key_env: not the name of an environment variable; nearest valid: {KEY!r}")
        if not self.model.strip():
            raise ValueError("model: empty; nearest valid: the name by which the endpoint lists it")


class Endpoint:
    """Asks questions, several at a time. Raises ImportError without the `openai` client."""

    def __init__(self, settings: Settings) -> None:
        try:
            import openai
        except ImportError as error:
            if (error.name or "").split(".")[0] != "openai":
                raise
            raise ImportError("judges need the openai client: pip install 'tempflow[judge]'", name="openai") from error
        self.settings = settings
        self._openai = openai
        self._client: OpenAI | None = None
        self._lock = threading.Lock()
        self._told: set[str] = set()

    @property
    def client(self) -> OpenAI:
        """Made on first use, with the key as it is then."""
        with self._lock:
            if self._client is None:
                s = self.settings
                key = os.environ.get(s.key_env) or "none"
                self._client = self._openai.OpenAI(
                    base_url=s.url, api_key=key, timeout=s.timeout, max_retries=s.retries
                )
            return self._client

    def check(self) -> None:
        """Raises RewardError where the endpoint cannot be reached, refuses the key, or lists models without ours."""
        s = self.settings
        try:
            listed = sorted({str(model.id) for model in self.client.models.list().data or ()})
        except self._openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise RewardError(self._refused(error.status_code)) from None
            return  # an endpoint need not list its models
        except self._openai.APIConnectionError as error:
            raise RewardError(f"url: {s.url} cannot be reached ({_why(error)})") from None
        except Exception:  # no list that can be read: as above
            return
        if listed and s.model not in listed:
            near = get_close_matches(s.model, listed, 1, 0.0)[0]
            raise RewardError(f"model: {s.model[:80]!r} is not at {s.url}; nearest valid: {near[:80]!r}")

    def ask(self, questions: Sequence[Question], read: Sequence[Callable[[Answer], float]]) -> list[float | None]:
        """The value of each question by its reader; None where it failed. Raises RewardError as `FINAL` says."""
        found: list[float | None] = [None] * len(questions)
        why: list[str] = []

        def one(n: int) -> None:
            try:
                found[n] = self._value(questions[n], read[n])
            except Unreadable as error:
                why.append(str(error))

        _in_threads(one, len(questions), self.settings.concurrency)
        if why:
            kinds = {re.sub(r"\d+|'.*'", "…", reason): reason for reason in why}
            new = [reason for kind, reason in kinds.items() if kind not in self._told]
            self._told |= kinds.keys()
            told = f"{len(why)} of {len(found)} questions to {self.settings.model} failed: {'; '.join(new or why[:1])}"
            _log.log(logging.WARNING if new else logging.DEBUG, "judge: %s", told)
        return found

    def _value(self, question: Question, read: Callable[[Answer], float]) -> float:
        """From the cache or the endpoint. Only an answer that could be read is kept. Raises Unreadable, RewardError."""
        file = self._file(question)
        if file is not None and (kept := _kept(file)) is not None:
            try:
                return read(kept)
            except Unreadable:
                pass  # a reader that has changed since
        answer = self._answer(question)
        value = read(answer)
        if not math.isfinite(value):
            raise Unreadable(f"{value} is no score")
        if file is not None:
            _keep(file, answer)
        return value

    def _answer(self, question: Question) -> Answer:
        openai = self._openai
        deadline = time.monotonic() + self.settings.timeout * (self.settings.retries + 1)
        try:
            completions = self.client.chat.completions.with_streaming_response
            with completions.create(**self._request(question)) as response:
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > LONGEST or time.monotonic() > deadline:
                        raise Unreadable("the response is too long or too slow")
        except Unreadable:
            raise
        except openai.APIStatusError as error:
            if error.status_code in FINAL:
                raise RewardError(self._refused(error.status_code)) from None
            raise Unreadable(f"status {error.status_code}") from None
        except Exception as error:  # of the connection, at any depth of the client
            raise Unreadable(_why(error)) from None
        return answer_of(bytes(body), self.settings.by_tokens)

    def _request(self, question: Question) -> dict[str, Any]:
        s = self.settings
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(png).decode()}}
            for png in question.pictures
        ]
        parts.append({"type": "text", "text": question.text})
        asked = {"logprobs": True, "top_logprobs": s.top} if s.by_tokens else {}
        return {
            "model": s.model,
            "messages": [{"role": "user", "content": parts}],
            "temperature": 0.0,
            "seed": s.seed,
            "max_tokens": 1 if s.by_tokens else s.max_tokens,
            **asked,
        }

    def _refused(self, status: int) -> str:
        s = self.settings
        if status == 404:
            return f"url: {s.url} answered 404: it has no model {s.model[:80]!r}, or is not the interface's root"
        held = "holds a key that it refuses" if os.environ.get(s.key_env) else "is not set"
        return f"url: {s.url} answered {status}; ${s.key_env} {held}"

    def _file(self, question: Question) -> Path | None:
        """Where the answer is kept: a name by all that it depends on."""
        s = self.settings
        if not s.cache:
            return None
        said = hashlib.sha256()
        limits = [s.top] if s.by_tokens else [s.max_tokens]
        head = json.dumps([1, s.model, s.version, s.seed, s.by_tokens, limits, question.text], ensure_ascii=True)
        for part in (head.encode(), *question.pictures):
            said.update(len(part).to_bytes(8, "big") + part)
        name = said.hexdigest()
        return Path(s.cache).expanduser() / name[:2] / f"{name}.json"


def answer_of(body: bytes, by_tokens: bool) -> Answer:
    """A response's body as an answer. Raises Unreadable unless it is a whole one: cut texts are none.

    by_tokens  the first token's probabilities count, so that an answer that was cut after it will do
    """
    try:
        told = json.loads(body)
        choice = told["choices"][0]
        text, finish = choice["message"]["content"], choice["finish_reason"]
        if by_tokens:
            first = choice["logprobs"]["content"][0]
            listed = [(str(t["token"]), float(t["logprob"])) for t in (*first["top_logprobs"], first)]
        else:
            listed = []
    except (ValueError, TypeError, LookupError, RecursionError, AttributeError, OverflowError) as error:
        raise Unreadable(f"the response is no completion ({type(error).__name__})") from None
    if finish not in ("stop", "length"):
        raise Unreadable(f"the answer ended by {str(finish)[:40]!r}")
    if finish == "length" and not by_tokens:
        raise Unreadable("the answer is cut at max_tokens")
    if not by_tokens and not isinstance(text, str):
        raise Unreadable("the answer has no text")
    if any(math.isnan(p) or p > 1e-3 for _, p in listed):
        raise Unreadable("log-probabilities that are none")
    top: dict[str, float] = {}
    for token, p in listed:  # the token that was taken may be listed twice
        top[token] = max(top.get(token, 0.0), math.exp(min(p, 0.0)))
    return Answer(text if isinstance(text, str) else "", top)


# --------------------------------------------------------------------------------------------------------------- cache
def _kept(file: Path) -> Answer | None:
    """None where there is no whole answer."""
    try:
        told = json.loads(file.read_bytes())
        if not isinstance(told["text"], str):
            return None
        return Answer(told["text"], {str(token): float(p) for token, p in told["top"].items()})
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def _keep(file: Path, answer: Answer) -> None:
    """Whole or not at all, whoever else writes the same, here or on another machine; a disk that refuses costs a second
    question, no score."""
    new = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps({"text": answer.text, "top": dict(answer.top)}), encoding="ascii")
        new.replace(file)
    except OSError as error:
        _log.warning("judge: an answer could not be kept in %s (%s)", file.parent, error.strerror)
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------ pictures
def png(picture: Tensor | np.ndarray) -> bytes:
    """uint8 [H, W, 3] as PNG."""
    return encoded(Image.fromarray(np.asarray(picture)))


# ------------------------------------------------------------------------------------------------------------- threads
def _in_threads(work: Callable[[int], None], count: int, threads: int) -> None:
    """work(0) … work(count − 1), `threads` at a time; raises what the first raised that did, when all have ended.

    Threads are daemons, as all that call rewards: a question on its way keeps no program from ending.
    """
    left, errors = SimpleQueue[int](), list[BaseException]()
    for n in range(count):
        left.put(n)

    def run() -> None:
        while not errors:
            try:
                work(left.get_nowait())
            except Empty:
                return
            except BaseException as error:  # raised below
                errors.append(error)

    running = [threading.Thread(target=run, name="judge", daemon=True) for _ in range(min(threads, count))]
    for thread in running:
        thread.start()
    try:
        for thread in running:
            thread.join()
    except BaseException:  # Ctrl-C: no further question is asked
        errors.append(KeyboardInterrupt())
        raise
    if errors:
        raise errors[0]


def _why(error: BaseException) -> str:
    """The kind of an error and of what caused it; its text may hold what was sent."""
    cause = error.__cause__
    return type(error).__name__ + (f", {type(cause).__name__}" if cause is not None else "")
