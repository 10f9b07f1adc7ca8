"""A real server process, in an environment with the core dependencies alone: it survives whatever it is sent."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from process import Served

from tempflow.cli import main
from tempflow.media import Media
from tempflow.rewards import remote as room
from tempflow.rewards import wire
from tempflow.rewards.wire import CONTENT

Head = dict[str, str]
ROWS, BYTES, PIXELS, REQUESTS = 32, 1 << 18, 1 << 15, 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = ["--max-rows", ROWS, "--max-bytes", BYTES, "--max-pixels", PIXELS, "--requests", REQUESTS]
    times = ["--timeout", 1, "--upload", 1, "--latency", 0.002]
    made = Served(tmp_path_factory.mktemp("server"), *map(str, [*limits, *times]), idle=1.0)
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def survives(server: Served) -> Iterator[None]:
    """After each test the same process answers rightly."""
    yield
    for _ in range(100):  # a scorer that is still asleep is waited for
        answer = ask(server, ["a"], pictures(1))
        if answer.status_code == 200 and answer.json()["ok"] == [[True]]:
            break
        time.sleep(0.1)
    assert answer.json()["values"] == [[mean(pictures(1))[0]]]
    assert server.process.poll() is None


def pictures(count: int, seed: int = 0, side: int = 8) -> Media:
    generator = torch.Generator().manual_seed(seed)
    return Media.of(torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator))


def mean(media: Media) -> list[float]:
    """The scorer's scores, in float32 as they travel."""
    means = [float(frames.numpy().mean()) + 1 for frames in media.frames]
    return torch.tensor(means).tolist()


def headers(server: Served, **more: str) -> Head:
    said = {"Authorization": f"Bearer {server.token}", "Content-Type": CONTENT}
    return said | {name.replace("_", "-"): value for name, value in more.items()}


def post(server: Served, data: Any, **more: str) -> Any:
    return httpx.post(f"{server.url}/v1/score", content=data, headers=headers(server, **more), timeout=30)


def ask(server: Served, prompts: list[str], media: Media, **more: str) -> Any:
    return post(server, wire.pack(media, prompts, [{}] * len(prompts)), **more)


def metrics(server: Served) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics", headers=headers(server)).text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r'tempflow_reward_[a-z_]+(\{[a-z]+="[a-z0-9]+"\})? [0-9.e+-]+', line) for line in lines)
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def raw(server: Served, data: bytes, wait: float = 20.0) -> bytes:
    """What comes back on a bare connection until it is closed."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as bare:
        bare.sendall(data)
        found = b""
        try:
            while part := bare.recv(65536):
                found += part
        except ConnectionResetError:
            pass
        return found


def start_of(server: Served, length: int) -> bytes:
    said = headers(server) | {"Host": "a", "Content-Length": str(length)}
    lines = [f"{name}: {value}" for name, value in said.items()]
    return "\r\n".join(["POST /v1/score HTTP/1.1", *lines, "", ""]).encode()


# -------------------------------------------------------------------------------------------------------- what is well
def test_it_scores_with_the_core_dependencies_alone(server: Served) -> None:
    media = pictures(5)
    assert ask(server, ["a"] * 5, media).json() == {
        "version": 1,
        "reward": "score",
        "columns": ["score"],
        "values": [[v] for v in mean(media)],
        "ok": [[True]] * 5,
        "reasons": [None] * 5,
    }


def test_who_asks_by_the_client_gets_the_same(server: Served) -> None:
    reward = room.remote(url=server.url, token_file=str(server.folder / "token"), batch=3, reward="score")
    media = pictures(8)
    scores = reward.score(media, ["a"] * 8, [{}] * 8)
    assert scores.value[:, 0].tolist() == mean(media) and scores.names == ("remote",)


def test_what_it_is_and_what_it_did(server: Served) -> None:
    about = httpx.get(f"{server.url}/v1/reward", headers=headers(server)).json()
    assert about["limits"] == {"rows": ROWS, "bytes": BYTES, "pixels": PIXELS} and about["reward"] == "score"
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
    before = metrics(server)
    ask(server, ["a", "blank", "a"], pictures(3))
    after = metrics(server)
    expected = {'rows_total{result="scored"}': 2, 'rows_total{result="failed"}': 1, "scorer_calls_total": 1}
    for name, more in expected.items():
        assert after[f"tempflow_reward_{name}"] - before[f"tempflow_reward_{name}"] == more
    assert after["tempflow_reward_requests_at_work"] == after["tempflow_reward_bytes_at_work"] == 0


def test_the_wire_is_described(server: Served) -> None:
    described = httpx.get(f"{server.url}/openapi.json").json()
    score = described["paths"]["/v1/score"]["post"]
    assert score["requestBody"]["content"].keys() == {CONTENT}
    assert score["x-head"]["properties"].keys() == wire.Head.model_fields.keys()
    assert {"401", "413", "429"} <= score["responses"].keys() and score["security"]
    assert set(described["components"]["schemas"]) >= {"Answer", "About"}


# ------------------------------------------------------------------------------------------------------- the token
@pytest.mark.parametrize("given", [None, "Bearer x", "Bearer", "Basic eA==", "Bearer \xff", "TOKEN", "Bearer TOKEN"])
@pytest.mark.parametrize("path", ["/v1/score", "/v1/reward", "/metrics"])
def test_nothing_without_the_token(server: Served, given: str | None, path: str) -> None:
    said = [] if given is None else [(b"Authorization", given.replace("TOKEN", server.token[:-1]).encode("latin-1"))]
    data = b"x" * 1000 if path == "/v1/score" else None
    answer = httpx.request("GET" if data is None else "POST", server.url + path, headers=said, content=data)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert set(answer.json()) == {"error"} and server.token not in answer.text


def test_the_token_is_in_a_file_that_is_its_owners(server: Served) -> None:
    file = server.folder / "token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and len(server.token) > 40
    assert server.token not in server.log.read_text()


# ------------------------------------------------------------------------------------------------ what is refused
def test_paths_and_methods_that_are_none(server: Served) -> None:
    for method, path, status in (("GET", "/v1/score", 405), ("GET", "/", 404), ("GET", "/docs", 404)):
        answer = httpx.request(method, server.url + path, headers=headers(server))
        assert answer.status_code == status and set(answer.json()) == {"error"}


def test_what_is_no_request(server: Served) -> None:
    good = wire.pack(pictures(1), ["a"], [{}])
    for data in (b"", b"abc", b"\0" * 100, good[:-1], good + b"x", b"\xff" * 50, good[4:]):
        assert post(server, data).status_code in (400, 413)
    for kind in ("application/json", "multipart/form-data", "application/octet-stream"):
        assert post(server, good, Content_Type=kind).status_code == 415
    assert post(server, good, Idempotency_Key="x y").status_code == 400


def test_what_is_too_large(server: Served) -> None:
    assert "nearest valid: at most" in post(server, bytes(BYTES + 1)).json()["error"]

    def endless() -> Iterator[bytes]:
        yield wire.LENGTH.pack(1 << 16)
        while True:
            yield bytes(1 << 14)

    def announced_and_more() -> Iterator[bytes]:
        yield wire.pack(pictures(1), ["a"], [{}])
        yield from endless()

    for data in (endless(), announced_and_more()):  # without a Content-Length
        with contextlib.suppress(httpx.TransportError):  # it stopped reading, and let the connection go
            assert post(server, data).status_code in (400, 413)
    many = Media.of(torch.zeros((ROWS + 1, 1, 1, 3), dtype=torch.uint8))
    assert ask(server, ["a"] * (ROWS + 1), many).status_code == 413
    assert "pixels" in ask(server, ["a"], Media.of(torch.zeros((1, 256, 256, 3), dtype=torch.uint8))).json()["error"]
    before = server.rss()
    form = {"codec": "png", "frames": 1, "height": 10**5, "width": 10**5}
    head = json.dumps({"version": 1, "prompts": ["a"], "metadata": [{}], "media": form, "bodies": [1]}).encode()
    assert post(server, wire.LENGTH.pack(len(head)) + head + b"x").status_code == 413
    assert server.rss() - before < 100_000_000


def test_media_that_the_reward_does_not_take(server: Served) -> None:
    clip = Media(torch.zeros((1, 3, 4, 4, 3), dtype=torch.uint8), 8.0)
    assert "takes picture" in ask(server, ["a"], clip).json()["error"]
    sound = Media(torch.zeros((1, 1, 4, 4, 3), dtype=torch.uint8), None, torch.zeros(1, 1, 8), 8000)
    assert ask(server, ["a"], sound).status_code == 422


def test_names_are_never_paths(server: Served) -> None:
    """Its process says when it opens a file whose name is marked."""
    marked = server.folder / "MARKED"
    marked.write_text("secret")
    places = [str(marked), "../MARKED", f"file://{marked}", "..\\MARKED", f"{marked}\0"]
    metadata: list[Any] = [{"image": p, p: [p], "source": {"path": p}} for p in places]
    answer = post(server, wire.pack(pictures(5), places, metadata), Idempotency_Key=f"../../{marked}")
    assert answer.json()["ok"] == [[True]] * 5
    for path in (f"/{marked}", "/../MARKED", "/%2e%2e/MARKED", "/v1/../../MARKED", "/v1/score/..%2fMARKED"):
        answer = raw(server, f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        assert b" 404 " in answer and b"secret" not in answer
    assert "OPENED" not in server.log.read_text()
    assert ask(server, [f"open {marked}"], pictures(1)).json()["ok"] == [[True]]  # as a reward itself may
    assert server.log.read_text().count("OPENED") == 1


# ------------------------------------------------------------------------------------------- slow and broken clients
def test_a_body_that_drips_is_not_waited_for(server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as bare:
        bare.sendall(start_of(server, 1000))
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.05):
                try:
                    bare.sendall(b"\0")
                except OSError:
                    return

        threading.Thread(target=drip, daemon=True).start()
        assert b" 408 " in bare.recv(65536)
        stop.set()


def test_headers_that_drip_are_not_waited_for(server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as bare:
        bare.sendall(b"POST /v1/score HTTP/1.1\r\n")
        with pytest.raises(OSError):
            for n in range(400):
                bare.sendall(f"X-{n}: 1\r\n".encode())
                time.sleep(0.05)
    assert raw(server, b"GET /hea") == b""


def test_clients_that_break_off(server: Served) -> None:
    data = wire.pack(pictures(1), ["sleep 0.1"], [{}])
    for sent in (b"", b"\x16\x03\x01\x02", start_of(server, len(data)), start_of(server, len(data)) + data[:100]):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as bare:
            bare.sendall(sent)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as bare:  # whole, and gone before the answer
        bare.sendall(start_of(server, len(data)) + data)
    assert b" 400 " in raw(server, b"NO HTTP\r\n\r\n")


# ----------------------------------------------------------------------------------------------------- broken scorers
def test_only_what_cannot_be_scored_fails(server: Served) -> None:
    media = pictures(5)
    told = ask(server, ["a", "raise this", "exit", "nan", "blank"], media).json()
    assert told["values"] == [[mean(media)[0]], [None], [None], [None], [None]]
    assert told["ok"] == [[True], [False], [False], [False], [False]]
    first, raised, left, nan, blank = told["reasons"]
    assert first is None and "RuntimeError: cannot score this" in raised and "SystemExit" in left
    assert nan == blank == wire.UNSCORED


def test_a_scorer_that_hangs_fails_its_scores(server: Served) -> None:
    told = ask(server, ["sleep 2", "a"], pictures(2)).json()
    assert told["ok"] == [[False], [False]] and "took longer than 1 s" in told["reasons"][0]


# -------------------------------------------------------------------------------------------------- many at a time
def test_more_requests_than_it_takes_are_told_to_come_again(server: Served) -> None:
    with ThreadPoolExecutor(REQUESTS + 6) as pool:
        asked = [pool.submit(ask, server, ["sleep 0.5"], pictures(1, n, 3 + n)) for n in range(REQUESTS + 6)]
        answers = [one.result() for one in asked]
    refused = [a for a in answers if a.status_code == 429]
    assert refused and all(int(a.headers["retry-after"]) >= 1 for a in refused)
    assert {a.status_code for a in answers} == {200, 429}


def test_the_same_key_is_scored_once(server: Served) -> None:
    data, other = (wire.pack(pictures(1, seed), ["sleep 0.2"], [{}]) for seed in (1, 2))
    before = metrics(server)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(post, server, data, Idempotency_Key="the-same-key") for _ in range(4)]
        answers = [one.result() for one in asked]
    answers.append(post(server, data, Idempotency_Key="the-same-key"))
    assert len({a.content for a in answers}) == 1 and answers[0].json()["values"] == [[mean(pictures(1, 1))[0]]]
    after = metrics(server)
    name = 'tempflow_reward_rows_total{result="scored"}'
    assert after[name] - before[name] == 1
    assert post(server, other, Idempotency_Key="the-same-key").status_code == 409


def test_none_is_lost_and_none_swapped(server: Served) -> None:
    """More clients than the server takes at a time: each gets the scores of its own pictures, each scored once."""
    before = metrics(server)

    def client(number: int) -> None:
        reward = room.remote(
            url=server.url, token_file=str(server.folder / "token"), batch=4, concurrency=2, codec="raw"
        )
        for turn in range(6):
            media = pictures(12, 1000 * number + turn)
            scores = reward.score(media, ["a"] * 12, [{}] * 12)
            assert scores.ok.all() and scores.value[:, 0].tolist() == mean(media)

    with ThreadPoolExecutor(8) as pool:
        for one in [pool.submit(client, n) for n in range(8)]:
            one.result()
    name = 'tempflow_reward_rows_total{result="scored"}'
    assert metrics(server)[name] - before[name] == 8 * 6 * 12


# ------------------------------------------------------------------------------------------------------------ restart
@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again_goes_on(tmp_path: Path) -> None:
    served = Served(tmp_path)
    reward = room.remote(url=served.url, token_file=str(tmp_path / "token"), batch=1, concurrency=4, retries=50)
    assert isinstance(reward, room.Remote)
    media = pictures(12)
    reward.prepare()

    def again() -> None:
        time.sleep(0.3)
        served.kill()
        served.start(str(served.port))

    thread = threading.Thread(target=again)
    thread.start()
    try:
        scores = reward.score(media, ["sleep 0.1"] * 12, [{}] * 12)
    finally:
        thread.join()
        served.stop()
    assert scores.value[:, 0].tolist() == mean(media)


# ------------------------------------------------------------------------------------------------------ command line
@pytest.mark.parametrize(
    "words, told",
    [
        ([], "exactly one of a reward's name and --function"),
        (["jpeg_compressibility", "--function", "a.py:f"], "exactly one"),
        (["jpeg_compressability"], "did you mean|nearest valid"),
        (["--function", "none.py:score"], "names no Python file"),
        (["--function", "scorer.py:scor"], "has no 'scor'; nearest valid: 'score'"),
        (["jpeg_compressibility", "--host", "0.0.0.0"], "host: other machines reach"),
        (["jpeg_compressibility", "--host", "0.0.0.0", "--expose"], "token_file: --expose needs a token"),
        (["jpeg_compressibility", "--token-file", "open"], "others can read"),
        (["jpeg_compressibility", "--token-file", "short"], "no token of 16"),
        (["jpeg_compressibility", "--port", "65536"], "port"),
        (["jpeg_compressibility", "--groupwise"], "groupwise, takes"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from process import SCORER

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(room.TOKEN, raising=False)
    (tmp_path / "scorer.py").write_text(SCORER)
    (tmp_path / "open").write_text("x" * 40)
    (tmp_path / "open").chmod(0o644)
    (tmp_path / "short").write_text("x")
    (tmp_path / "short").chmod(0o600)
    assert main(["serve-reward", *words]) == 2
    said = capsys.readouterr().err
    assert re.search(told, said) and said.count("\n") == 1
