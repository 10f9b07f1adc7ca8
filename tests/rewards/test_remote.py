"""The client of a reward server, against servers that do all that can go wrong: failed is failed, and never 0."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from fake import Bench, Fake, brightness
from PIL import Image

from tempflow.media import Media
from tempflow.rewards import remote as room
from tempflow.rewards import score_all, wire
from tempflow.rewards.protocol import Unreachable
from tempflow.rewards.remote import Remote, _Server
from tempflow.rewards.safe import SafeReward
from tempflow.rewards.wire import LENGTH, Head

TOKEN = "a-token-of-the-tests"
LIMITS = wire.Limits(rows=1024, bytes=1 << 28, pixels=1 << 27)
PICTURES = Media.of(torch.arange(5 * 4 * 4 * 3, dtype=torch.uint8).view(5, 4, 4, 3))
PROMPTS = [f"prompt {n}" for n in range(5)]

Handler = BaseHTTPRequestHandler
Fault = Callable[["FakeServer", Handler, Head], None]


class FakeServer:
    """Answers every request as the next of `faults` does, and well when there is none left: a score is the number at
    the end of the prompt. `keys` are the idempotency keys, in order."""

    def __init__(self, about: dict[str, Any] | None = None, port: int = 0) -> None:
        self.faults: list[Fault] = []
        self.keys: list[str] = []
        self.heads: list[Head] = []
        self.about = {
            "version": 1,
            "reward": "number",
            "columns": None,
            "groupwise": False,
            "takes": "picture",
            "codecs": ["png", "raw"],
            "limits": {"rows": 1024, "bytes": 1 << 28, "pixels": 1 << 27},
        } | (about or {})
        self.over = threading.Event()
        self.judge: Callable[[Media, Head], list[float]] | None = None
        fake = self

        class Requests(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fake.said(self, json.dumps(fake.about).encode())

            def do_POST(self) -> None:
                if self.headers["Authorization"] != f"Bearer {TOKEN}":
                    return fake.said(self, b'{"error":"a bearer token is needed"}', 401)
                data = self.rfile.read(int(self.headers["Content-Length"]))
                head = wire.read_head(data[: wire.head_size(data[: LENGTH.size], LIMITS)], LIMITS)
                if fake.judge is not None:
                    start = wire.head_size(data[: LENGTH.size], LIMITS)
                    values = fake.judge(wire.read_media(head, memoryview(data)[start:]), head)
                    return fake.said(self, body(head, values=[[v] for v in values]))
                fake.keys.append(self.headers["Idempotency-Key"])
                fake.heads.append(head)
                fault = fake.faults.pop(0) if fake.faults else good
                fault(fake, self, head)
                return None

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Requests)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()

    @staticmethod
    def said(handler: Handler, data: bytes, status: int = 200, **headers: Any) -> None:
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)


def body(head: Head, **changes: Any) -> bytes:
    said = {"version": 1, "reward": "number", "columns": ["number"]}
    said |= {"ok": [[True]] * len(head.prompts), "reasons": [None] * len(head.prompts)}
    said |= {} if "values" in changes else {"values": [[float(text.split()[-1])] for text in head.prompts]}
    return json.dumps(said | changes).encode()


def good(server: FakeServer, handler: Handler, head: Head) -> None:
    server.said(handler, body(head))


def answers(**changes: Any) -> Fault:
    return lambda server, handler, head: server.said(handler, body(head, **changes))


def status(code: int, **headers: str) -> Fault:
    return lambda server, handler, head: server.said(handler, b'{"error":"so it is"}', code, **headers)


def hang(server: FakeServer, handler: Handler, head: Head) -> None:
    server.over.wait(20)
    handler.close_connection = True


def reset(server: FakeServer, handler: Handler, head: Head) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def truncated(server: FakeServer, handler: Handler, head: Head) -> None:
    data = body(head)
    server.said(handler, data[:10], **{"Content-Length": str(len(data))})
    handler.close_connection = True


def drip(server: FakeServer, handler: Handler, head: Head) -> None:
    """Headers without end, a byte at a time."""
    try:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not server.over.wait(0.02):
            handler.wfile.write(b"x")
    except OSError:
        pass
    handler.close_connection = True


def drip_body(server: FakeServer, handler: Handler, head: Head) -> None:
    try:
        server.said(handler, b"{", **{"Content-Length": "100000"})
        while not server.over.wait(0.02):
            handler.wfile.write(b" ")
    except OSError:
        pass
    handler.close_connection = True


def endless(server: FakeServer, handler: Handler, head: Head) -> None:
    try:
        server.said(handler, b"", **{"Content-Length": str(1 << 40)})
        while not server.over.is_set():
            handler.wfile.write(b" " * (1 << 20))
    except OSError:
        pass
    handler.close_connection = True


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BASE", 0.005)
    monkeypatch.setattr(room, "PAUSE", 0.05)
    monkeypatch.setenv(room.TOKEN, TOKEN)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    made = FakeServer()
    yield made
    made.close()


def reward_of(*servers: FakeServer, **options: Any) -> Remote:
    made = room.remote(url=tuple(s.url for s in servers), **({"batch": 2, "timeout": 5.0} | options))
    assert isinstance(made, Remote)
    return made


def scored(reward: Remote, prompts: list[str] = PROMPTS) -> list[float | None]:
    scores = reward.score(PICTURES[: len(prompts)], prompts, [{}] * len(prompts))
    assert scores.names == ("remote",) and len(scores) == len(prompts)
    return [v if ok else None for v, ok in zip(scores.value[:, 0].tolist(), scores.ok[:, 0].tolist(), strict=True)]


# ------------------------------------------------------------------------------------------------------------- overlap
def test_a_remote_reward_overlaps_the_rollout_and_gives_the_bits_of_serial_scoring(server: FakeServer) -> None:
    """The server answers a chunk when the next one's rollout has begun: one after the other, it would wait for ever."""
    began, calls = [threading.Event() for _ in range(8)], 0

    class Told(Fake):
        chunks = 0

        def predictor(self, condition: Any, guidance: Any, network: Any = None) -> Any:
            predict = super().predictor(condition, guidance, network)

            def watched(x: torch.Tensor, sigma: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
                if not torch.is_grad_enabled() and float(sigma[0]) == 1:
                    began[self.chunks].set()
                    self.chunks += 1
                return predict(x, sigma, rows)

            return watched

    def local(images: list[Any], prompts: list[str]) -> list[float | None]:
        return brightness(images, prompts)

    def far(media: Media, head: Head) -> list[float]:
        nonlocal calls
        calls += 1
        assert began[min(calls, 2)].wait(20)
        images = [Image.fromarray(picture) for picture in media.pictures().numpy()]
        return [float(v) for v in brightness(images, []) if v is not None]

    server.judge = far
    reward = reward_of(server, batch=36)
    overlapped = Bench(Told(), reward=reward, rollout_leaves=36)
    serial = Bench(reward=local, rollout_leaves=36, overlap=False)
    overlapped.iterate()
    serial.iterate()
    assert calls == 3 and all(
        torch.equal(a, b) for a, b in zip(*(bench.trainable.masters for bench in (overlapped, serial)), strict=True)
    )


# ------------------------------------------------------------------------------------------------------- what is well
@pytest.mark.parametrize("options", [{}, {"batch": 16}, {"codec": "raw", "concurrency": 1}, {"batch": 1}], ids=str)
def test_scores_come_in_order_whatever_the_requests(server: FakeServer, options: dict[str, Any]) -> None:
    assert scored(reward_of(server, **options)) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len(set(server.keys)) == len(server.keys) == -(-5 // options.get("batch", 2))


def test_several_servers_share_the_requests(server: FakeServer) -> None:
    other = FakeServer()
    assert scored(reward_of(server, other, batch=1)) == [0.0, 1.0, 2.0, 3.0, 4.0]
    other.close()
    assert server.heads and other.heads and len(server.heads + other.heads) == 5


def test_a_request_is_as_large_as_the_server_takes() -> None:
    server = FakeServer({"limits": {"rows": 3, "bytes": 1 << 20, "pixels": 4 * 4 * 2}})
    assert scored(reward_of(server, batch=16)) == [0.0, 1.0, 2.0, 3.0, 4.0]
    server.close()
    assert sorted(len(head.prompts) for head in server.heads) == [1, 2, 2]


def test_media_of_a_prompt_that_are_compared_are_one_request() -> None:
    server = FakeServer({"groupwise": True})
    reward = reward_of(server, groupwise=True, batch=1)
    assert scored(reward, ["one 7"] * 4) == [7.0] * 4
    server.close()
    assert [len(head.prompts) for head in server.heads] == [4]


def test_a_running_event_loop_is_no_obstacle(server: FakeServer) -> None:
    """A notebook has one."""

    async def cell() -> list[float | None]:
        return scored(reward_of(server))

    assert asyncio.run(cell()) == [0.0, 1.0, 2.0, 3.0, 4.0]


# ----------------------------------------------------------------------------------------------------- what goes wrong
PASSING: dict[str, list[Fault]] = {
    "500": [status(500)] * 3,
    "502, then 408": [status(502), status(408)],
    "429 with Retry-After": [status(429, Retry_After="0")] * 12,
    "503 with Retry-After": [status(503, Retry_After="0")] * 12,
    "reset": [reset] * 2,
    "truncated": [truncated] * 2,
    "all of them": [reset, truncated, status(500), status(429, Retry_After="0"), reset],
}


@pytest.mark.parametrize("faults", PASSING.values(), ids=PASSING)
def test_what_passes_is_asked_again_under_the_same_key(server: FakeServer, faults: list[Fault]) -> None:
    server.faults = [*faults]
    assert scored(reward_of(server, batch=16)) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len(server.keys) == len(faults) + 1 and len(set(server.keys)) == 1


@pytest.mark.parametrize("fault", [hang, drip, drip_body], ids=["hang", "slow headers", "slow body"])
def test_a_try_has_an_end(server: FakeServer, fault: Fault) -> None:
    server.faults = [fault]
    assert scored(reward_of(server, batch=16, timeout=0.3)) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len(server.keys) == 2


LASTING: dict[str, tuple[Fault, str]] = {
    "500": (status(500), "answers 500: so it is, after 3 tries"),
    "reset": (reset, "after 3 tries"),
    "truncated": (truncated, "after 3 tries"),
    "hang": (hang, "did not answer in 0.2 s, after 3 tries"),
    "slow headers": (drip, "did not answer in 0.2 s, after 3 tries"),
    "busy for ever": (status(429, Retry_After="1000"), "answers 429"),
    "busy until a date": (status(503, Retry_After="Fri, 01 Jan 2100 00:00:00 GMT"), "answers 503"),
    "no token": (status(401), "answers 401"),
    "too large": (status(413), "answers 413"),
    "moved": (status(302, Location="http://127.0.0.1:1/"), "answers 302"),
    "endless": (endless, "answers more than"),
    "wrong length": (answers(values=[[1.0]]), "values has 1 rows for"),
    "other columns": (answers(columns=["a", "b"]), "row 0 has 1 values"),
    "another reward": (answers(reward="other"), "of reward 'other'"),
    "no JSON": (lambda s, h, head: s.said(h, b"<html>"), "no JSON"),
    "NaN": (lambda s, h, head: s.said(h, body(head).replace(b"0.0", b"NaN", 1)), "no JSON|values"),
    "infinity": (lambda s, h, head: s.said(h, body(head).replace(b"[[", b"[[1e999], [", 1)), "answer"),
    "a value that failed": (
        lambda s, h, head: answers(ok=[[False]] * len(head.prompts))(s, h, head),
        "a value must",
    ),
    "packed": (lambda s, h, head: s.said(h, b"\x1f\x8b0000", Content_Encoding="gzip"), "no JSON"),
}


@pytest.mark.parametrize("fault, told", LASTING.values(), ids=LASTING)
def test_what_lasts_fails_the_call_and_is_never_0(
    server: FakeServer, fault: Fault, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MAX_ANSWER", 1 << 21)
    server.faults = [fault] * 40
    reward = reward_of(server, batch=16, retries=2, timeout=0.2 if fault in (hang, drip) else 5.0, deadline=10.0)
    prompts = ["prompt 0", "prompt 1", "prompt 2"]
    with pytest.raises(Unreachable, match=told) as error:
        scored(reward, prompts)
    assert "\n" not in str(error.value)
    asked = len(server.keys)
    scores = score_all([reward], PICTURES[:3], prompts, [{}] * 3, [0, 1, 2])
    assert not scores.ok.any() and scores.value.isnan().all()
    assert len(server.keys) - asked <= asked  # not anew for each prompt


def test_a_server_that_is_not_there_is_told_before_a_run(server: FakeServer) -> None:
    server.close()
    with pytest.raises(Unreachable, match=r"url: http://127.0.0.1:\d+: ConnectError"):
        reward_of(server).prepare()


def test_a_wrong_token_is_told_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer()
    monkeypatch.setattr(server, "said", lambda h, data, *_, **__: FakeServer.said(h, b'{"error":"none"}', 401))
    with pytest.raises(Unreachable, match="answers 401: none"):
        reward_of(server).prepare()
    server.close()


@pytest.mark.parametrize(
    "about, options, told",
    [
        ({}, {"reward": "pickscore"}, "reward: .* serves reward 'number', and 'pickscore'"),
        ({"groupwise": True}, {}, "groupwise: .* serves groupwise True, and False"),
        ({"takes": "video"}, {}, "takes: .* serves takes 'video', and 'picture'"),
        ({"codecs": ["raw"]}, {}, "codec: .* does not take 'png'"),
        ({"version": 2}, {}, "version"),
    ],
)
def test_a_server_of_something_else_is_told_before_a_run(
    about: dict[str, Any], options: dict[str, Any], told: str
) -> None:
    server = FakeServer(about)
    with pytest.raises(ValueError, match=told):
        reward_of(server, **options).prepare()
    server.close()


def test_servers_must_serve_the_same(server: FakeServer) -> None:
    other = FakeServer({"reward": "another"})
    with pytest.raises(ValueError, match="serves reward 'another', and 'number' is asked for"):
        reward_of(server, other).prepare()
    other.close()


def test_one_request_that_fails_does_not_cost_the_others_their_scores(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults = [answers(values=[[1.0]])]
    assert scored(reward_of(server, concurrency=1)) == [None, None, 2.0, 3.0, 4.0]
    assert "values has 1 rows for 2 media" in caplog.text


def test_a_score_that_failed_at_the_server_is_failed_with_its_reason(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    failed = {"values": [[3.0], [None]], "ok": [[True], [False]], "reasons": [None, "blank picture"]}
    server.faults = [answers(**failed), answers(**failed)]
    reward = reward_of(server)
    with caplog.at_level(logging.WARNING):
        assert scored(reward, PROMPTS[:2]) == scored(reward, PROMPTS[:2]) == [3.0, None]
    assert caplog.text.count("blank picture") == 1  # told once
    server.faults = [answers(values=[[None]] * 2, ok=[[False]] * 2, reasons=["no memory"] * 2)]
    safe = SafeReward(reward)
    assert not safe.score(PICTURES[:2], PROMPTS[:2], [{}] * 2).ok.any()
    assert safe.fault is not None and "no memory" in safe.fault.text
    server.faults = [answers(values=[[None]] * 2, ok=[[False]] * 2, reasons=[wire.UNSCORED] * 2)]
    assert scored(reward, PROMPTS[:2]) == [None, None]


def test_another_server_takes_over(server: FakeServer) -> None:
    gone = FakeServer()
    reward = reward_of(gone, server, batch=1, retries=3)
    reward.prepare()
    gone.close()
    assert scored(reward) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_server_that_is_started_again_goes_on(server: FakeServer) -> None:
    reward = reward_of(server, batch=16)
    reward.prepare()
    server.close()
    threading.Timer(0.2, lambda: again.append(FakeServer(port=server.port))).start()
    again: list[FakeServer] = []
    assert scored(reward) == [0.0, 1.0, 2.0, 3.0, 4.0]
    again[0].close()


def test_several_columns_keep_their_names(server: FakeServer) -> None:
    two = {"columns": ["number", "other"], "values": [[1.0, 2.0]], "ok": [[True, True]], "reasons": [None]}
    server.faults = [answers(**two)]
    scores = reward_of(server).score(PICTURES[:1], PROMPTS[:1], [{}])
    assert scores.names == ("remote", "other") and scores.value.tolist() == [[1.0, 2.0]]


def test_a_server_that_forgot_its_columns_fails_those_that_are_known(server: FakeServer) -> None:
    """One that was started again, and has scored nothing since, tells one column."""
    two = {"columns": ["number", "other"], "values": [[1.0, 2.0]], "ok": [[True, True]], "reasons": [None]}
    none = {"values": [[None]], "ok": [[False]], "reasons": [wire.UNSCORED]}
    reward = reward_of(server)
    server.faults = [answers(**two), answers(**none)]
    found = [reward.score(PICTURES[:1], PROMPTS[:1], [{}]) for _ in range(2)]
    assert [one.names for one in found] == [("remote", "other")] * 2 and not found[1].ok.any()


def test_columns_that_change_fail_the_call(server: FakeServer) -> None:
    reward = reward_of(server)
    assert scored(reward, PROMPTS[:1]) == [0.0]
    server.faults = [answers(columns=["other"])]
    with pytest.raises(Unreachable, match="columns other; expected number"):
        scored(reward, PROMPTS[:1])


# --------------------------------------------------------------------------------------------------------- the breaker
def test_a_server_that_fails_often_is_left_alone_and_then_tried_by_one_request() -> None:
    server, now = _Server("http://x"), time.monotonic()
    for _ in range(room.TRIPS - 1):
        server.failed()
    assert server.ready(now)
    server.failed()
    assert not server.ready(now) and server.ready(now + room.PAUSE + 1)
    server.at_work = 1
    assert not server.ready(now + room.PAUSE + 1)
    for _ in range(60):
        server.failed()
    assert server.not_before <= time.monotonic() + room.LONGEST


def test_the_waits_are_drawn_from_a_generator_of_their_own(server: FakeServer) -> None:
    import random

    random.seed(0)
    torch.manual_seed(0)
    before = (random.getstate(), torch.get_rng_state())
    server.faults = [status(500)] * 3
    scored(reward_of(server))
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(
    "value, seconds", [("3", 3.0), ("0", 0.0), ("-1", None), ("soon", None), ("", None), (None, None), ("1e9", None)]
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert room._retry_after(value) == seconds
    assert room._retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0.0


# ------------------------------------------------------------------------------------------------------------- options
@pytest.mark.parametrize(
    "options, told",
    [
        ({"url": "127.0.0.1:80"}, "no address"),
        ({"url": "ftp://a"}, "no address"),
        ({"url": "http://[::1"}, "no address"),
        ({"url": "http://a/?token=x"}, "no address"),
        ({"url": "http://user:pass@a"}, "a name or a password"),
        ({"url": ()}, "0 of them"),
        ({"url": ("http://a", "http://a/")}, "2 of them, not all different"),
        ({"url": "http://a", "token_env": "NOT_SET_ANYWHERE"}, "'NOT_SET_ANYWHERE' holds none"),
        ({"url": "http://a", "token_file": "/not/there"}, "cannot be read"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        room.remote(**options)
    assert "pass" not in str(error.value).replace("password", "")


def test_the_token_may_be_in_a_file(tmp_path: Any, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(room.TOKEN)
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert scored(reward_of(server, token_file=str(tmp_path / "token")))[0] == 0.0
