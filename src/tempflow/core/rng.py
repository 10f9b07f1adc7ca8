"""Counter-based noise: a draw is a pure function of (run seed, stream name, identity), never of what was drawn before.

Philox4x64-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3; SC 2011) turns a 256-bit counter
and a 128-bit key into four 64-bit words. The key is a hash of the seed and the stream's name. The counter is a block
number beside a 192-bit hash of the row's identity. So a row does not depend on batch, order, rank or threads.

The words are numpy's own. What is made of them has the same bits on every CPU, because it takes only integers, tables
and single +, −, × and ÷, which IEEE 754 fixes to the last bit; no vendor's log, exp or cos takes part. Both steps are
numpy calls that release Python's lock, so other threads go on while noise is drawn.
"""

from __future__ import annotations

import hashlib
import math
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NoiseKind = Literal["normal", "uniform"]
"""What a dynamics or a corruption draws from: standard normals, or uniforms in (0, 1)."""

_CHUNK = 1 << 14
"""Words worked on at a time, a multiple of a block's four: what they become stays in a core's cache."""

_OCTAVES, _CELLS = 32, 64
"""The normal table has a piece for each 64th of every interval [2⁻ᵏ⁻¹, 2⁻ᵏ] of probability."""

_MANTISSA = 23
_CELL_BITS = _MANTISSA - _CELLS.bit_length() + 1
"""Bits of a float32 below those that number a cell of its octave."""

_SIGN = 1 << 31

_FARTHEST, _DENSITY = 6.3379577545537895, 7.553855895161334e-10
"""The normal that lies above all but 2⁻³³ of its kind, and the density there."""

_TWO_WORDS, _THREE_WORDS = struct.Struct("<2Q"), struct.Struct("<3Q")

# the first part of an identity, so that two kinds of draw with one identity share no words
_NORMAL, _UNIFORM, _INTEGERS, _PERMUTATION = range(4)


def fold(*parts: int) -> tuple[int, int, int]:
    """Hash integers of any size and sign to a 192-bit identity, as three 64-bit words.

    Order and number of the parts matter: fold(1, 2), fold(2, 1) and fold(1, 2, 0) differ.
    """
    digest = hashlib.blake2b(b"".join(map(_packed, parts)), digest_size=24).digest()
    return _THREE_WORDS.unpack(digest)


@dataclass(frozen=True)
class Stream:
    """A named stream of random numbers of one run; streams with another seed or name are independent of it.

    An identity is a tuple of integers, such as (iteration, prompt, root, node, step). The four kinds of draw
    share no numbers even where they share an identity. All draws happen on the CPU.
    """

    seed: int
    name: str

    def noise(self, kind: NoiseKind, ids: Sequence[tuple[int, ...]], shape: Sequence[int]) -> Tensor:
        """`normal` or `uniform`, by the name of the kind. Raises ValueError for another."""
        if kind not in get_args(NoiseKind):
            raise ValueError(f"noise: {kind!r} is not one of {', '.join(get_args(NoiseKind))}; nearest valid: 'normal'")
        return self.normal(ids, shape) if kind == "normal" else self.uniform(ids, shape)

    def normal(self, ids: Sequence[tuple[int, ...]], shape: Sequence[int]) -> Tensor:
        """Standard normals, float32 [len(ids), *shape]; |z| <= 6.34.

        Row j depends only on (seed, name, ids[j]); a smaller shape gives the leading elements of a larger one.
        """
        count = _size(shape)
        out = np.empty((len(ids), count), dtype=np.float32)
        for rows, first, words in self._words(_NORMAL, ids, -(-count // 2)):
            place = out[rows, 2 * first : 2 * (first + words.shape[1])]
            place[:] = _normals(words)[:, : place.shape[1]]
        return torch.as_tensor(out).view(len(ids), *shape)

    def uniform(self, ids: Sequence[tuple[int, ...]], shape: Sequence[int]) -> Tensor:
        """Uniforms in the open interval (0, 1), float64 [len(ids), *shape], on a grid of 2⁵² midpoints.

        Row j depends only on (seed, name, ids[j]).
        """
        count = _size(shape)
        out = np.empty((len(ids), count), dtype=np.float64)
        for rows, first, words in self._words(_UNIFORM, ids, count):
            out[rows, first : first + words.shape[1]] = ((words >> 12) + 0.5) * 2.0**-52
        return torch.as_tensor(out).view(len(ids), *shape)

    def integers(self, id: tuple[int, ...], high: int, count: int) -> list[int]:
        """``count`` integers in [0, high): a 64-bit word modulo high, so the bias is below high/2⁶⁴.

        Raises ValueError unless 1 <= high <= 2³² and count >= 0.
        """
        if not 1 <= high <= 1 << 32:
            nearest = min(max(high, 1), 1 << 32)
            raise ValueError(f"high: {high} is outside [1, 2**32]; the nearest valid value is {nearest}")
        return [word % high for word in self._row_of_words(_INTEGERS, id, count)]

    def permutation(self, id: tuple[int, ...], n: int) -> list[int]:
        """A random order of 0 … n−1 (Fisher–Yates on 64-bit words). Raises ValueError when n < 0."""
        if n < 0:
            raise ValueError(f"n: {n} is negative; the nearest valid value is 0")
        order = list(range(n))
        for last, word in zip(range(n - 1, 0, -1), self._row_of_words(_PERMUTATION, id, n), strict=False):
            other = word % (last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def _row_of_words(self, kind: int, id: tuple[int, ...], count: int) -> list[int]:
        if count < 0:
            raise ValueError(f"count: {count} is negative; the nearest valid value is 0")
        return philox(self._key(), fold(kind, *id), 0, count).tolist()

    def _key(self) -> tuple[int, int]:
        digest = hashlib.blake2b(_packed(self.seed) + self.name.encode(), digest_size=16).digest()
        return _TWO_WORDS.unpack(digest)

    def _words(
        self, kind: int, ids: Sequence[tuple[int, ...]], each: int
    ) -> Iterator[tuple[slice, int, NDArray[np.uint64]]]:
        """All rows' words, ``each`` to a row, a part at a time: which rows, the first word's place, words [rows, n]."""
        key, together = self._key(), max(1, _CHUNK // max(1, each))
        for row in range(0, len(ids), together):
            identities = [fold(kind, *id) for id in ids[row : row + together]]
            for first in range(0, each, _CHUNK):
                part = [philox(key, identity, first, min(_CHUNK, each - first)) for identity in identities]
                yield slice(row, row + len(part)), first, part[0][None] if len(part) == 1 else np.array(part)


class _Generator(threading.local):
    """A numpy generator for each thread, as one takes long to make and little to put elsewhere."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(0)


_GENERATOR = _Generator()


def philox(key: tuple[int, int], identity: tuple[int, int, int], first: int, count: int) -> NDArray[np.uint64]:
    """The words ``first`` … ``first + count − 1`` of a row, uint64 [count].

    Block b = 0, 1, … of four words is Philox4x64-10 of the counter (b + 1, *identity). ``first`` is a multiple of 4.
    """
    state: Any = {  # numpy takes sequences of integers too, which are quicker to read than arrays
        "bit_generator": "Philox",
        "state": {"counter": (first // 4, *identity), "key": key},  # it counts before it draws
        "buffer": (0, 0, 0, 0),
        "buffer_pos": 4,  # nothing is left in the buffer
        "has_uint32": 0,
        "uinteger": 0,
    }
    generator = _GENERATOR.philox
    generator.state = state
    return generator.random_raw(count)


def _normals(words: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Two standard normals from each word, the lower half's first: float32 [N, 2·n] from uint64 [N, n].

    A half is a sign and an integer m < 2³¹. Of all normals, the share (m + ½)·2⁻³² lies above the one that it gives:
    the inverse of the normal distribution, by `_table`. Exponent and leading bits of m + ½ as float32 number its cell,
    the other bits are the place within.
    """
    halves = words.astype("<u8", copy=False).view("<u4")
    share = (halves & np.uint32(_SIGN - 1)).view(np.int32).astype(np.float32)
    share += np.float32(0.5)
    bits = share.view(np.int32)
    cell = (bits >> _CELL_BITS).astype(np.intp)
    cell -= 126 * _CELLS  # ½ = 2⁻¹ has the exponent 126
    bits &= (1 << _CELL_BITS) - 1
    inside = bits.astype(np.float32)
    start, slope, bend = _table()
    z = bend.take(cell, mode="wrap")
    z *= inside
    z += slope.take(cell, mode="wrap")
    z *= inside
    z += start.take(cell, mode="wrap")
    z.view(np.uint32)[:] |= halves & np.uint32(_SIGN)
    return z


@lru_cache(maxsize=1)
def _table() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """The normal z above which the share u of all lies, for u from 2⁻³³ to ½: a parabola in each cell.

    With f the density at z, dz/du = −1/f and df/du = z, which Taylor's series follows from the far end: no exp is
    needed, and an error made where u is small is nothing where u is large. Within 5e-7 of the true one.
    """
    z, f = _FARTHEST, _DENSITY
    rows: list[tuple[float, float, float]] = []
    for octave in range(_OCTAVES):
        h = 2.0 ** (octave - _OCTAVES - 1) / _CELLS / 2
        for _ in range(_CELLS):
            start, z, f = z, *_onward(z, f, h)
            middle, z, f = z, *_onward(z, f, h)
            slope, bend = 4 * middle - 3 * start - z, 2 * start + 2 * z - 4 * middle
            rows.append((start, slope * 2.0**-_CELL_BITS, bend * 4.0**-_CELL_BITS))
    start, slope, bend = np.array([*rows, (0.0, 0.0, 0.0)], dtype=np.float64).astype(np.float32).T.copy()
    return start, slope, bend


def _onward(z: float, f: float, h: float) -> tuple[float, float]:
    """z and its density f, where the share above is larger by h."""
    a = -1 / f
    b = z * a * a
    c = (1 + 2 * z * z) * a * a * a
    d = (7 + 6 * z * z) * z * a * a * a * a
    return (
        z + h * (a + h / 2 * (b + h / 3 * (c + h / 4 * d))),
        f + h * (z + h / 2 * (a + h / 3 * (b + h / 4 * c))),
    )


@lru_cache(maxsize=1 << 14, typed=True)
def _packed(part: int) -> bytes:
    """An integer with its length in front, so that no two lists of integers read alike."""
    body = part.to_bytes(part.bit_length() // 8 + 1, "little", signed=True)
    return len(body).to_bytes(4, "little") + body


def _size(shape: Sequence[int]) -> int:
    if any(size < 0 for size in shape):
        raise ValueError(f"shape: {tuple(shape)} has a negative size; the nearest valid size is 0")
    count = math.prod(shape)
    if count > 1 << 33:
        raise ValueError(f"shape: {tuple(shape)} has {count} elements a row; the largest valid number is {1 << 33}")
    return count
