"""A judge for tests and experiments: a local HTTP server that speaks /v1/chat/completions and answers by a function.

It is no part of the package. `erring_judge` compares by a score and errs as told; `verifier_judge` does for `shapes`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Asked:
    """What came over the wire. pictures: uint8 [H, W, 3] each, in order; number: of the request, from 0."""

    text: str
    pictures: Sequence[np.ndarray]
    body: Mapping[str, Any]
    headers: Mapping[str, str]
    number: int


@dataclass(frozen=True)
class Reply:
    """A completion, or a fault.

    top     probabilities of the first token's likeliest, where they were asked for
    status  200, or what is answered in its place; `headers` go with it
    raw     bytes in the place of the body
    delay   seconds before anything is sent
    drip    seconds between the body's bytes; 0 sends it at once
    cut     bytes of the body after which the connection is closed; None sends all
    """

    text: str | None = ""
    finish: str = "stop"
    top: Mapping[str, float] = field(default_factory=dict)
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    delay: float = 0.0
    drip: float = 0.0
    cut: int | None = None


class JudgeServer:
    """Use as a context manager; `url` is the interface's root.

    asked   all requests in order of arrival, where they are to be kept; `count` is how many there were
    models  what it lists; None: it lists none
    key     without which nobody is let in
    """

    def __init__(
        self,
        decide: Callable[[Asked], Reply],
        models: Sequence[str] | None = ("judge",),
        key: str | None = None,
        keep: bool = True,
    ) -> None:
        self.asked: list[Asked] = []
        self.count, self._keep = 0, keep
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"decide": staticmethod(decide), "owner": self, "models": models})
        self.key = key
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def note(self, text: str, pictures: list[np.ndarray], body: dict[str, Any], headers: Mapping[str, str]) -> Asked:
        with self._lock:
            asked = Asked(text, pictures, body, headers, self.count)
            self.count += 1
            if self._keep:
                self.asked.append(asked)
            return asked


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # connections that wait; five, as is usual, are soon too few


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet: else each answer waits for a delayed acknowledgement
    disable_nagle_algorithm = True
    decide: Callable[[Asked], Reply]
    owner: JudgeServer
    models: Sequence[str] | None

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self._let_in():
            listed = self.models is not None and self.path == "/v1/models"
            found = {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models or ()]}
            self._send(Reply(status=200 if listed else 404), found if listed else {"error": "not found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._let_in():
            return
        parts = body["messages"][-1]["content"]
        pictures = [_decoded(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        reply = self.decide(self.owner.note(text, pictures, body, dict(self.headers)))
        listed = [{"token": t, "logprob": math.log(p) if p else -9999.0} for t, p in reply.top.items()]
        first = {**max(listed, key=lambda t: t["logprob"]), "top_logprobs": listed} if listed else None
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": reply.text},
            "finish_reason": reply.finish,
            "logprobs": {"content": [first]} if first and body.get("logprobs") else None,
        }
        self._send(reply, {"id": "x", "object": "chat.completion", "model": body["model"], "choices": [choice]})

    def _let_in(self) -> bool:
        if self.owner.key is None or self.headers["Authorization"] == f"Bearer {self.owner.key}":
            return True
        self._send(Reply(status=401), {"error": {"message": "no"}})
        return False

    def _send(self, reply: Reply, said: Mapping[str, Any]) -> None:
        time.sleep(reply.delay)
        body = json.dumps(said).encode() if reply.raw is None else reply.raw
        try:
            self.send_response(reply.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            sent = body if reply.cut is None else body[: reply.cut]
            for at in range(0, len(sent), 1 if reply.drip else max(1, len(sent))):
                self.wfile.write(sent[at : at + 1] if reply.drip else sent)
                self.wfile.flush()
                time.sleep(reply.drip)
            self.close_connection = self.close_connection or reply.cut is not None
        except OSError:  # the client has gone
            self.close_connection = True


def _decoded(url: str) -> np.ndarray:
    head, _, data = url.partition(",")
    if head != "data:image/png;base64":
        raise ValueError(f"a picture by {head!r}; PNG data URLs are sent")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)), formats=["PNG"]).convert("RGB"))


def erring_judge(
    score: Callable[[str, np.ndarray], float], failures: float = 0.1, bias: float = 0.3, seed: int = 0
) -> Callable[[Asked], Reply]:
    """Says in the words of `unified_1_pairs` which of two pictures has the larger score for its caption, and errs.

    failures  share of the questions that get no verdict, however often they are asked: refused, cut off, or babble
    bias      share of the others in which the first picture wins whatever it shows

    Which these are depends on the seed and on what is asked alone.
    """
    scoring = threading.Lock()
    faults = (Reply(status=400, raw=b"{}"), Reply(text="Image 1 is bet", finish="length"), Reply(text="I cannot say."))

    def decide(asked: Asked) -> Reply:
        caption = asked.text.partition("Caption: ")[2].partition("\n")[0]
        said = hashlib.sha256(f"{seed} {caption}".encode() + b"".join(p.tobytes() for p in asked.pictures)).digest()
        failed, biased = (int.from_bytes(said[8 * n : 8 * n + 8], "big") / 2**64 for n in range(2))
        if failed < failures:
            return faults[said[16] % len(faults)]
        with scoring:
            first, second = (score(caption, picture) for picture in asked.pictures)
        if biased < bias or first > second:
            return Reply("Image 1 is better.")
        return Reply("Both images are equally good." if first == second else "Image 2 is better.")

    return decide


def verifier_judge(failures: float = 0.1, bias: float = 0.3, seed: int = 0) -> Callable[[Asked], Reply]:
    """`erring_judge` by the graded score of the `shapes` world's verifier."""
    from tempflow.shapes.prompts import by_prompt
    from tempflow.shapes.verify import judge

    known = by_prompt()
    return erring_judge(lambda caption, picture: judge(picture, known[caption]).graded, failures, bias, seed)
