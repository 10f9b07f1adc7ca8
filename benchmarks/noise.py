"""What noise costs on one core: `core.rng` beside what it was at revision 8bbcf4a, in turn in one run.

    python -m benchmarks.noise [--pairs 15]

Processor time of one thread; the last line, which is wall time, wants two free cores. `Before` is that revision's code,
but for its comments and checks.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from benchmarks.pairs import timed
from tempflow.core.rng import Stream

CASES = (((16, 64, 64), 1), ((16, 64, 64), 8), ((16, 128, 128), 2), ((8, 8, 8), 1), ((8, 8, 8), 12), ((8, 8, 8), 200))
"""A row's shape, and how many are drawn at once."""


class Before:
    """Philox4x32-10 by torch's int64 tensors, then Box–Muller in float64."""

    mask, multipliers, key_steps, chunk = 0xFFFFFFFF, (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 1 << 15

    def __init__(self, seed: int, name: str) -> None:
        self.seed, self.name = seed, name

    def normal(self, ids: Sequence[tuple[int, ...]], shape: Sequence[int]) -> Tensor:
        count = math.prod(shape)
        out = torch.empty(len(ids), -(-count // 4), 4, dtype=torch.float32, device="cpu")
        flat = out.view(-1, 4)
        for part, (w0, w1, w2, w3) in self.words(0, ids, out.shape[1]):
            rows = flat[part]
            rows[:, 0], rows[:, 1] = self.box_muller(w0, w1)
            rows[:, 2], rows[:, 3] = self.box_muller(w2, w3)
        return out.flatten(1)[:, :count].reshape(len(ids), *shape)

    def words(
        self, kind: int, ids: Sequence[tuple[int, ...]], blocks: int
    ) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor, Tensor]]]:
        identity = torch.tensor([hashed(b"".join(packed(p) for p in (kind, *i)), 3) for i in ids]).view(-1, 3)
        k0, k1 = hashed(packed(self.seed) + self.name.encode(), 2)
        for start in range(0, len(ids) * blocks, self.chunk):
            stop = min(start + self.chunk, len(ids) * blocks)
            flat = torch.arange(start, stop, dtype=torch.int64, device="cpu")
            row = flat // blocks
            who = identity[row]
            yield slice(start, stop), self.rounds(flat - row * blocks, who[:, 0], who[:, 1], who[:, 2], k0, k1)

    def rounds(
        self, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: int, k1: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        for _ in range(10):
            first, second = c0 * self.multipliers[0], c2 * self.multipliers[1]
            c0 = ((second >> 32) & self.mask) ^ c1 ^ k0
            c2 = ((first >> 32) & self.mask) ^ c3 ^ k1
            c1, c3 = second & self.mask, first & self.mask
            k0, k1 = (k0 + self.key_steps[0]) & self.mask, (k1 + self.key_steps[1]) & self.mask
        return c0, c1, c2, c3

    def box_muller(self, radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        length = (-2 * ((radius.double() + 0.5) * 2.0**-32).log()).sqrt()
        turn = (angle.double() + 0.5) * (2 * math.pi * 2.0**-32)
        return length * turn.cos(), length * turn.sin()


def hashed(data: bytes, words: int) -> list[int]:
    digest = hashlib.blake2b(data, digest_size=4 * words).digest()
    return [int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(words)]


@lru_cache(maxsize=1 << 14, typed=True)
def packed(part: int) -> bytes:
    body = part.to_bytes(part.bit_length() // 8 + 1, "little", signed=True)
    return len(body).to_bytes(4, "little") + body


def longest_wait(draw: Callable[[], object]) -> float:
    """Longest time that a thread of plain Python waits for its turn while another draws, in seconds."""
    worst, done = 0.0, threading.Event()
    thread = threading.Thread(target=lambda: (draw(), done.set()))
    thread.start()
    last = time.perf_counter()
    while not done.is_set():
        now = time.perf_counter()
        worst, last = max(worst, now - last), now
    thread.join()
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    a = parser.parse_args()
    torch.set_num_threads(1)
    old, new = Before(0, "noise"), Stream(0, "noise")
    for shape, rows in CASES:
        ids = [(3, row, 0, 5) for row in range(rows)]
        pairs = timed(lambda i=ids, s=shape: old.normal(i, s), lambda i=ids, s=shape: new.normal(i, s), a.pairs)
        rate = rows * math.prod(shape) / sorted(pairs.after)[a.pairs // 2] / 1e6
        print(f"{rows:4d} x {'x'.join(map(str, shape)):>10}: {pairs}; {rate:.0f} M normals a second")
    row = [(0, 0)]
    wait = longest_wait(lambda: new.normal(row, (1 << 24,)))
    print(f"another thread waits {1e3 * wait:.1f} ms at the longest while 17 million normals are drawn")


if __name__ == "__main__":
    main()
