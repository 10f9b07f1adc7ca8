"""Bytes that are nearly requests: none breaks the server's decoder, and none gets a 0 for a score that failed."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx
import pytest
import torch
from fuzzing import LIMITS, inputs

from tempflow.core.scores import Scores
from tempflow.media import Media
from tempflow.rewards import from_function, wire
from tempflow.rewards.wire import LENGTH, Answer, WireError
from tempflow.serve.app import Settings, make_app


def decode(data: bytes) -> Media | None:
    """As the server does; None where it refuses."""
    try:
        if len(data) < LENGTH.size:
            raise WireError("no head")
        start = wire.head_size(data[: LENGTH.size], LIMITS)
        head = wire.read_head(data[:start], LIMITS)
        media = wire.read_media(head, memoryview(data)[start:])
    except WireError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        return None
    assert len(media) == len(head.prompts) == len(head.metadata)
    return media


def fuzz_decoder(seed: int, count: int) -> tuple[int, int]:
    """How many were refused, how many are requests."""
    found = [decode(data) is not None for data in inputs(seed, count)]
    return found.count(False), found.count(True)


def fuzz_answers(seed: int, count: int) -> None:
    """What a client makes of answers that are nearly some."""
    draw = random.Random(seed)
    value = torch.tensor([[0.5, 3.0], [float("nan"), 1.0], [2.5, float("nan")]])
    scores = Scores(value, value.isfinite(), ("r", "s"))
    text = wire.answer_of("r", scores, [None, "x", "y"]).model_dump_json().encode()
    odd = (b"", b"null", b"NaN", b"-", b"9", b"[", b"]", b"true", b",", b'"')
    for _ in range(count):
        out = bytearray(text)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(out))
            out[at : at + draw.choice((0, 1, 1, 4))] = draw.choice(odd)
        try:
            scores = wire.scores_of(wire.parse(Answer, out, "answer"), 3, None)
        except WireError as error:
            assert "\n" not in str(error)
        else:
            assert bool(scores.value[scores.ok].isfinite().all() and scores.value[~scores.ok].isnan().all())
            assert not bool((scores.value == 0).any())  # nothing above can say 0, and nothing else becomes it


async def fuzz_server(seed: int, count: int) -> dict[int, int]:
    """The whole server, in this process. Its reward is above 0 for everything, or fails."""

    def score(images: list[Any], prompts: list[str]) -> list[float | None]:
        return [None if "\0" in text else 1.0 + image.size[0] for image, text in zip(images, prompts, strict=True)]

    app = make_app(from_function(score, name="r"), "t" * 20, Settings(LIMITS, latency=0.0))
    headers = {"Authorization": "Bearer " + "t" * 20, "Content-Type": wire.CONTENT}
    seen = dict[int, int]()
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://a") as client:
        for data in inputs(seed, count):
            answer = await client.post("/v1/score", content=data, headers=headers)
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            if answer.status_code == 200:
                told = wire.parse(Answer, answer.content, "answer")
                assert all(v is None or v > 1 for row in told.values for v in row)
            else:
                assert answer.status_code in (400, 413, 422) and set(answer.json()) == {"error"}
    return seen


def test_a_share_of_the_inputs() -> None:
    refused, taken = fuzz_decoder(1, 2000)
    assert refused > 1000 and taken > 20
    fuzz_answers(1, 1000)
    seen = asyncio.run(fuzz_server(2, 150))
    assert seen[200] and seen[400]


@pytest.mark.slow
def test_a_hundred_thousand_inputs() -> None:
    for seed in range(100, 200):
        refused, taken = fuzz_decoder(seed, 1000)
        assert refused and taken
    fuzz_answers(100, 100_000)
    seen = asyncio.run(fuzz_server(300, 5000))
    assert sum(seen.values()) == 5000
