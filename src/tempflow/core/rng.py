"""Counter-based noise: a draw is a pure function of (run seed, stream name, identity), never of what was drawn before.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3; SC 2011) turns a 128-bit counter
and a 64-bit key into four 32-bit words. Here the key is a hash of the seed and the stream's name, and the counter is a
block number beside a 96-bit hash of the row's identity; so rows do not depend on batch, order, rank or threads.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_Word = TypeVar("_Word", int, Tensor)
_CHUNK = 1 << 15
"""Blocks worked on at a time: bounds memory, and stays in cache."""
_FEW = 32
"""Up to so many blocks Python's integers are quicker than tensors."""

# the first part of an identity, so that two kinds of draw with one identity share no words
_NORMAL, _UNIFORM, _INTEGERS, _PERMUTATION = range(4)


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10: four random words for each counter.

    Args:
        counter: int64 [N, 4], values in [0, 2³²).
        key: int64 [2], or [N, 2] for a key of each row; values in [0, 2³²).

    Returns int64 [N, 4] with values in [0, 2³²). Raises ValueError for other shapes or dtypes.
    """
    if counter.dim() != 2 or counter.shape[1] != 4 or counter.dtype != torch.int64:
        raise ValueError(f"counter: {counter.dtype} {tuple(counter.shape)} must be torch.int64 [N, 4]")
    if key.shape not in ((2,), (counter.shape[0], 2)) or key.dtype != torch.int64:
        raise ValueError(f"key: {key.dtype} {tuple(key.shape)} must be torch.int64 (2,) or ({counter.shape[0]}, 2)")
    c0, c1, c2, c3 = counter.unbind(1)
    return torch.stack(_rounds(c0, c1, c2, c3, key[..., 0], key[..., 1]), dim=1)


def _rounds(
    c0: _Word, c1: _Word, c2: _Word, c3: _Word, k0: _Word | int, k1: _Word | int
) -> tuple[_Word, _Word, _Word, _Word]:
    """Ten rounds on one counter, of integers, or on many, of int64 tensors."""
    for _ in range(_ROUNDS):
        # the product may wrap around int64; its 64 bits are right all the same, and >> then & reads the upper half
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((second >> 32) & _MASK) ^ c1 ^ k0
        c2 = ((first >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = second & _MASK, first & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def fold(*parts: int) -> tuple[int, int, int]:
    """Hash integers of any size and sign to a 96-bit identity, as three 32-bit words.

    Order and number of the parts matter: fold(1, 2), fold(2, 1) and fold(1, 2, 0) differ.
    """
    words = _hashed(b"".join(_packed(part) for part in parts), 3)
    return words[0], words[1], words[2]


@dataclass(frozen=True)
class Stream:
    """A named stream of random numbers of one run; streams with another seed or name are independent of it.

    An identity is a tuple of integers, such as (iteration, prompt, root, node, step). The four kinds of draw
    share no numbers even where they share an identity. All draws happen on the CPU.
    """

    seed: int
    name: str

    def normal(self, ids: Sequence[tuple[int, ...]], shape: Sequence[int]) -> Tensor:
        """Standard normals, float32 [len(ids), *shape], by the Box–Muller transform; |z| <= 6.77.

        Row j depends only on (seed, name, ids[j]); a smaller shape gives the leading elements of a larger one.
        """
        count = _size(shape)
        out = torch.empty(len(ids), _blocks(count, 4), 4, dtype=torch.float32, device="cpu")
        flat = out.view(-1, 4)
        for part, (w0, w1, w2, w3) in self._words(_NORMAL, ids, out.shape[1]):
            rows = flat[part]
            rows[:, 0], rows[:, 1] = _box_muller(w0, w1)
            rows[:, 2], rows[:, 3] = _box_muller(w2, w3)
        return out.flatten(1)[:, :count].reshape(len(ids), *shape)

    def uniform(self, ids: Sequence[tuple[int, ...]], shape: Sequence[int]) -> Tensor:
        """Uniforms in the open interval (0, 1), float64 [len(ids), *shape], on a grid of 2⁵² midpoints.

        Row j depends only on (seed, name, ids[j]).
        """
        count = _size(shape)
        out = torch.empty(len(ids), _blocks(count, 2), 2, dtype=torch.float64, device="cpu")
        flat = out.view(-1, 2)
        for part, (w0, w1, w2, w3) in self._words(_UNIFORM, ids, out.shape[1]):
            rows = flat[part]
            rows[:, 0] = (((w0 << 20) | (w1 >> 12)).double() + 0.5) * 2.0**-52
            rows[:, 1] = (((w2 << 20) | (w3 >> 12)).double() + 0.5) * 2.0**-52
        return out.flatten(1)[:, :count].reshape(len(ids), *shape)

    def integers(self, id: tuple[int, ...], high: int, count: int) -> list[int]:
        """``count`` integers in [0, high): a 64-bit word modulo high, so the bias is below high/2⁶⁴.

        Raises ValueError unless 1 <= high <= 2³² and count >= 0.
        """
        if not 1 <= high <= 1 << 32:
            nearest = min(max(high, 1), 1 << 32)
            raise ValueError(f"high: {high} is outside [1, 2**32]; the nearest valid value is {nearest}")
        return [word % high for word in self._wide_words(_INTEGERS, id, count)]

    def permutation(self, id: tuple[int, ...], n: int) -> list[int]:
        """A random order of 0 … n−1 (Fisher–Yates on 64-bit words). Raises ValueError when n < 0."""
        if n < 0:
            raise ValueError(f"n: {n} is negative; the nearest valid value is 0")
        order = list(range(n))
        for last, word in zip(range(n - 1, 0, -1), self._wide_words(_PERMUTATION, id, n), strict=False):
            other = word % (last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def _wide_words(self, kind: int, id: tuple[int, ...], count: int) -> list[int]:
        """``count`` random 64-bit integers."""
        if count < 0:
            raise ValueError(f"count: {count} is negative; the nearest valid value is 0")
        blocks = _blocks(count, 2)
        halves: list[int] = []
        if blocks <= _FEW:
            identity, key = fold(kind, *id), self._key()
            for block in range(blocks):
                halves += _rounds(block, *identity, *key)
        else:
            for _, words in self._words(kind, [id], blocks):
                halves += torch.stack(words, dim=1).flatten().numpy().tolist()
        return [high << 32 | low for high, low in zip(halves[::2], halves[1::2], strict=True)][:count]

    def _key(self) -> tuple[int, int]:
        words = _hashed(_packed(self.seed) + self.name.encode(), 2)
        return words[0], words[1]

    def _words(
        self, kind: int, ids: Sequence[tuple[int, ...]], blocks: int
    ) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor, Tensor]]]:
        """The four words of every block of every row, a slice of the flat (row, block) list at a time."""
        identity = torch.tensor([fold(kind, *id) for id in ids], dtype=torch.int64, device="cpu").view(-1, 3)
        k0, k1 = self._key()
        for start in range(0, len(ids) * blocks, _CHUNK):
            stop = min(start + _CHUNK, len(ids) * blocks)
            flat = torch.arange(start, stop, dtype=torch.int64, device="cpu")
            row = flat // blocks
            who = identity[row]
            yield slice(start, stop), _rounds(flat - row * blocks, who[:, 0], who[:, 1], who[:, 2], k0, k1)


def _box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals from two 32-bit words.

    In float64 (and rounded to float32 by the caller), so that a vector library's last bit does not show in the result.
    """
    length = (-2 * ((radius.double() + 0.5) * 2.0**-32).log()).sqrt()
    turn = (angle.double() + 0.5) * (2 * math.pi * 2.0**-32)
    return length * turn.cos(), length * turn.sin()


def _hashed(data: bytes, words: int) -> list[int]:
    digest = hashlib.blake2b(data, digest_size=4 * words).digest()
    return [int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(words)]


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


def _blocks(count: int, each: int) -> int:
    """How many blocks hold ``count`` values, ``each`` to a block."""
    return -(-count // each)
