"""Inputs that are nearly requests: seeded, so that a number stands for the same bytes everywhere."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import torch

from tempflow.media import Media
from tempflow.rewards import wire
from tempflow.rewards.wire import LENGTH, Limits

LIMITS = Limits(rows=6, bytes=1 << 16, pixels=1 << 13)

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 2**64, 10**40, -(2**63), 0.5, 1e308, -0.0),
    *("", "a", "png", "raw", "ffv1", "\u0000", "../../etc/passwd", "€" * 50, [], {}, [[]], [None], [1, 2], [0]),
    {"a": {"a": [1]}},
)
SIZES = (0, 1, 2, 2**31, 2**32 - 1)
TEXTS = (b"NaN", b"Infinity", b"-1e999", b'"\\ud800"', b"[" * 2000, b'{"a":' * 500, b"\xff\xfe", b"1" * 5000, b"\0")


def seeds() -> list[bytes]:
    """Small requests of every kind."""
    generator = torch.Generator().manual_seed(0)
    made: list[bytes] = []
    codecs: tuple[wire.Codec, ...] = ("png", "raw", "ffv1") if wire.has_ffv1() else ("png", "raw")
    for codec in codecs:
        for rows, frames, sound in ((1, 1, False), (3, 1, False), (2, 3, True)):
            pixels = torch.randint(0, 256, (rows, frames, 4, 6, 3), dtype=torch.uint8, generator=generator)
            heard = torch.rand((rows, 1, 8), generator=generator) if sound else None
            media = Media(pixels, 4.0 if frames > 1 else None, heard, 8000 if sound else None)
            metadata = [{"tag": "two", "include": [{"class": "cat", "count": 1}]}] * rows
            made.append(wire.pack(media, ["a cat", "", "€ 🦊"][:rows], metadata, codec))
    return made


def inputs(seed: int, count: int) -> Iterator[bytes]:
    """So many of them."""
    draw, known = random.Random(seed), seeds()
    for _ in range(count):
        data = draw.choice(known)
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            data = draw.choice(WAYS)(draw, data, known)
        yield data


def _split(data: bytes) -> tuple[bytes, bytes]:
    size = LENGTH.size + (LENGTH.unpack_from(data)[0] if len(data) >= LENGTH.size else 0)
    return data[LENGTH.size : size], data[size:]


def _joined(head: bytes, bodies: bytes) -> bytes:
    return LENGTH.pack(len(head)) + head + bodies


def _flip(draw: random.Random, data: bytes, known: list[bytes]) -> bytes:
    out = bytearray(data)
    for _ in range(draw.randint(1, 4) if out else 0):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def _cut(draw: random.Random, data: bytes, known: list[bytes]) -> bytes:
    at = draw.randint(0, len(data))
    return data[:at] + data[min(len(data), at + draw.randint(0, 40)) :]


def _splice(draw: random.Random, data: bytes, known: list[bytes]) -> bytes:
    other = draw.choice(known)
    at = draw.randint(0, len(other))
    place = draw.randint(0, len(data))
    return data[:place] + other[at : at + draw.randint(0, 60)] + data[place:]


def _length(draw: random.Random, data: bytes, known: list[bytes]) -> bytes:
    return LENGTH.pack(draw.choice((*SIZES, len(data), len(data) + 9, draw.randrange(2**32)))) + data[4:]


def _text(draw: random.Random, data: bytes, known: list[bytes]) -> bytes:
    """Odd text in the head, whose length is then told rightly."""
    head, bodies = _split(data)
    at = draw.randint(0, len(head))
    return _joined(head[:at] + draw.choice(TEXTS) + head[at + draw.randint(0, 9) :], bodies)


def _tree(draw: random.Random, data: bytes, known: list[bytes]) -> bytes:
    """An odd value somewhere in the head, a key less, or one more."""
    head, bodies = _split(data)
    try:
        tree = json.loads(head)
    except (ValueError, RecursionError):
        return data
    inside: Any = tree
    while isinstance(inside, dict | list) and inside:
        keys = [*inside] if isinstance(inside, dict) else [*range(len(inside))]
        key = draw.choice(keys)
        if not isinstance(inside[key], dict | list) or not inside[key] or draw.random() < 0.4:
            how = draw.random()
            if how < 0.7:
                inside[key] = draw.choice(ODD)
            elif how < 0.85:
                del inside[key]
            elif isinstance(inside, dict):
                inside[draw.choice(("path", "file", "version", "x"))] = draw.choice(ODD)
            else:
                inside.append(draw.choice(ODD))
            break
        inside = inside[key]
    return _joined(json.dumps(tree).encode(), bodies)


def _body(draw: random.Random, data: bytes, known: list[bytes]) -> bytes:
    """Bits of the bodies turned, and the head left as it is: what reaches the decoders."""
    head, bodies = _split(data)
    return _joined(head, _flip(draw, bodies, known))


WAYS = (_flip, _cut, _splice, _length, _text, _tree, _tree, _body, _body)
