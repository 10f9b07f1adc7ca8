"""Noise against Random123's published vectors, scipy's normal, and the laws of the design page."""

import hashlib
import io
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from tempflow.core.rng import _CHUNK, Stream, _normals, fold, philox

# tests/kat_vectors of Random123, philox4x64 with 10 rounds: counter, key, output
KNOWN = [
    (
        "0000000000000000 0000000000000000 0000000000000000 0000000000000000",
        "0000000000000000 0000000000000000",
        "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b",
    ),
    (
        "ffffffffffffffff ffffffffffffffff ffffffffffffffff ffffffffffffffff",
        "ffffffffffffffff ffffffffffffffff",
        "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0",
    ),
    (
        "243f6a8885a308d3 13198a2e03707344 a4093822299f31d0 082efa98ec4e6c89",
        "452821e638d01377 be5466cf34e90c6c",
        "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
    ),
]
IDS = [(0, prompt, node) for prompt in range(8) for node in range(8)]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def big_integer_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 on Python's own integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for i in range(10):
        left, right = divmod(0xD2E7470EE14C6C93 * c0, 1 << 64), divmod(0xCA5A826395121157 * c2, 1 << 64)
        x, y = (k0 + i * 0x9E3779B97F4A7C15) % (1 << 64), (k1 + i * 0xBB67AE8584CAA73B) % (1 << 64)
        c0, c1, c2, c3 = right[0] ^ c1 ^ x, right[1], left[0] ^ c3 ^ y, left[1]
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_random123s_known_answers(counter: str, key: str, want: str) -> None:
    assert big_integer_philox(words(counter), words(key)) == words(want)


word = st.integers(0, 2**64 - 1)


@given(st.tuples(word, word), st.tuples(word, word, word), st.integers(0, 2**32), st.integers(1, 9))
def test_a_rows_words_are_philox_of_its_key_and_counter(
    key: tuple[int, int], identity: tuple[int, int, int], block: int, count: int
) -> None:
    want = [w for b in range(3) for w in big_integer_philox([block + b + 1, *identity], list(key))]
    assert philox(key, identity, 4 * block, count).tolist() == want[:count]


@given(st.lists(st.integers(-(2**200), 2**200), max_size=5), st.lists(st.integers(-300, 300), max_size=5))
def test_fold_tells_identities_apart(a: list[int], b: list[int]) -> None:
    assert (fold(*a) == fold(*b)) == (a == b)
    assert all(0 <= part < 2**64 for part in fold(*a))


def test_fold_is_fixed_for_all_time() -> None:
    """A changed hash would silently change every run: 192 bits of BLAKE2b over length-prefixed integers."""
    packed = bytes([1, 0, 0, 0, 7]) + bytes([1, 0, 0, 0, 255]) + bytes([2, 0, 0, 0, 255, 0])
    digest = hashlib.blake2b(packed, digest_size=24).digest()
    assert fold(7, -1, 255) == tuple(int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16))


@given(st.lists(st.sampled_from(IDS), max_size=20), st.sampled_from([(), (1,), (3, 5), (130,)]))
@settings(max_examples=40, deadline=None)
def test_a_row_depends_on_its_identity_alone(ids: list[tuple[int, ...]], shape: tuple[int, ...]) -> None:
    stream = Stream(3, "steps")
    together = stream.normal(ids, shape)
    assert together.shape == (len(ids), *shape)
    assert together.dtype == torch.float32
    for id, row in zip(ids, together, strict=True):
        assert torch.equal(stream.normal([id], shape)[0], row)


def test_long_rows_and_many_rows_are_cut_the_same() -> None:
    """Rows of more words than are worked on at a time, and not a multiple of it."""
    stream, count = Stream(3, "steps"), 2 * _CHUNK + 4001
    together = stream.normal(IDS[:4], (count,))
    assert torch.equal(stream.normal(IDS[2:3], (count,))[0], together[2])
    assert torch.equal(stream.normal(IDS[3:4], (37,))[0], together[3, :37])
    assert torch.equal(stream.uniform(IDS[:4], (count,))[3], stream.uniform(IDS[3:4], (count,))[0])
    for rows in (_CHUNK // 20, _CHUNK // 20 + 1, 2 * (_CHUNK // 20) + 1):  # whole chunks of rows, and a bit more
        many = stream.normal([(i,) for i in range(rows)], (40,))
        assert torch.equal(many[-1], stream.normal([(rows - 1,)], (40,))[0])


def test_threads_that_draw_at_once_share_nothing() -> None:
    stream = Stream(1, "x")
    alone = [stream.normal([id], (40_000,)) for id in IDS[:8]]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda id: stream.normal([id], (40_000,)), IDS[:8]))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


GOLDEN = """
import hashlib
from tempflow.core.rng import Stream
z = Stream(7, "golden").normal([(i, -i) for i in range(3)], (100_001,)).numpy()
u = Stream(7, "golden").uniform([(i, -i) for i in range(3)], (1001,)).numpy()
print(z[1, :6].tobytes().hex(), hashlib.sha256(z.tobytes() + u.tobytes()).hexdigest())
"""
BITS = (
    "d8005bbff9f40ec0c5496ebe1f66de3fdc6d59bf49dde53e add5b2bc9813718b12fdb3cbd665f4d23f3ad2368a89baddfaa6e4979ee525bb"
)


def test_the_bits_are_the_same_on_every_cpu() -> None:
    """Golden bits, by numpy's best kernels here and, in a process of its own, by its plainest."""
    said = io.StringIO()
    with redirect_stdout(said):
        exec(GOLDEN, {})
    assert said.getvalue().strip() == BITS
    features = np.show_config(mode="dicts")["SIMD Extensions"]["found"]  # beyond those that numpy cannot do without
    plain = {**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(features)}
    done = subprocess.run([sys.executable, "-c", GOLDEN], env=plain, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == BITS


def test_a_normal_is_the_inverse_of_the_normal_distribution() -> None:
    """scipy's, at both ends, around every power of two and at random: each half of a word is a sign and a share."""
    edges = [2**k + d for k in range(32) for d in (-1, 0, 1)]
    chance = np.random.default_rng(0).integers(0, 2**31, 20_000)
    share = np.unique(np.concatenate([edges, chance]).clip(0, 2**31 - 1).astype(np.uint64))
    want = special.ndtri((share + 0.5) * 2.0**-32)
    z = _normals((share << np.uint64(32) | share | np.uint64(1 << 31))[None]).reshape(-1, 2)
    assert np.abs(z[:, 0] - want).max() < 5e-7 and np.abs(z[:, 1] + want).max() < 5e-7  # lower half first, signed
    assert (np.diff(z[:, 0]) >= -5e-7).all() and z[0, 0] == pytest.approx(-6.33796, abs=1e-5)


def test_order_changes_nothing() -> None:
    stream = Stream(1, "x")
    assert torch.equal(stream.normal(IDS[::-1], (33,)).flip(0), stream.normal(IDS, (33,)))


def test_neither_the_global_generator_nor_the_default_dtype_matters() -> None:
    stream = Stream(1, "x")
    torch.manual_seed(0)
    state, first = torch.get_rng_state(), stream.normal(IDS[:2], (9,))
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_default_dtype(torch.float64)
    try:
        again = stream.normal(IDS[:2], (9,))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(first, again)
    assert again.dtype == torch.float32


def test_normals_are_normal() -> None:
    z = Stream(0, "moments").normal([(i,) for i in range(400)], (512,)).double().flatten().numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert abs(z.mean()) < 4 / len(z) ** 0.5
    assert abs(z.var() - 1) < 4 * (2 / len(z)) ** 0.5
    assert abs(stats.skew(z)) < 4 * (6 / len(z)) ** 0.5
    assert abs(stats.kurtosis(z)) < 4 * (24 / len(z)) ** 0.5


def test_tails_have_their_share() -> None:
    """Of 4 million: beyond 3, 4 and 4.5 on both sides, and the spread of the rare large ones."""
    z = Stream(2, "tails").normal([(i,) for i in range(64)], (1 << 16,)).flatten().double().numpy()
    for edge in (3.0, 4.0, 4.5):
        for side in (z, -z):
            share = stats.norm.sf(edge)
            assert abs((side > edge).sum() - share * len(z)) < 4.5 * (share * len(z)) ** 0.5
    beyond = z[z > 3]
    assert stats.kstest(stats.norm.sf(beyond) / stats.norm.sf(3), "uniform").pvalue > 1e-3


def test_the_eight_places_of_a_block_are_uncorrelated_normals() -> None:
    z = Stream(5, "places").normal([(i,) for i in range(100)], (2048,)).double().view(-1, 8)
    for place in range(8):
        assert stats.kstest(z[:, place].numpy(), "norm").pvalue > 1e-3
    for power in (z, z.square()):
        off_diagonal = torch.corrcoef(power.T) - torch.eye(8)
        assert float(off_diagonal.abs().max()) < 4.5 / len(z) ** 0.5


def test_neighbouring_identities_are_unrelated() -> None:
    n = 4096
    rows = Stream(9, "rows").normal(IDS, (n,)).double()
    off_diagonal = torch.corrcoef(rows) - torch.eye(len(IDS))
    assert float(off_diagonal.abs().max()) < 5 / n**0.5
    shifted = (rows[:-1, 1:] * rows[1:, :-1]).mean(1)
    assert float(shifted.abs().max()) < 5 / n**0.5


def test_seed_and_name_make_other_numbers() -> None:
    id, n = (1, 2), 4096
    streams = [Stream(0, "a"), Stream(1, "a"), Stream(0, "b"), Stream(-1, "a"), Stream(2**70, "a")]
    rows = [stream.normal([id], (n,))[0].double() for stream in streams]
    for a, b in itertools.combinations(rows, 2):
        assert abs(float((a * b).mean())) < 5 / n**0.5
    assert torch.equal(Stream(0, "a").normal([id], (n,)), Stream(0, "a").normal([id], (n,)))


def test_kinds_of_draw_with_one_identity_share_no_words() -> None:
    """A normal's place in its distribution would show a uniform's leading bits."""
    stream, id = Stream(0, "a"), (1, 2)
    place = stats.norm.cdf(stream.normal([id], (4096, 2))[0].numpy())
    u = stream.uniform([id], (4096, 1))[0].numpy()
    assert np.abs(np.triu(np.corrcoef(np.concatenate([place, u], 1).T), 1)).max() < 5 / 64


def test_uniforms() -> None:
    u = Stream(2, "t").uniform([(i,) for i in range(100)], (3, 111))
    assert u.shape == (100, 3, 111)
    assert u.dtype == torch.float64
    assert 0 < float(u.min()) < 1e-3
    assert 1 - 1e-3 < float(u.max()) < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    fine = (u * 2**32) % 1
    assert stats.kstest(fine.flatten().numpy(), "uniform").pvalue > 1e-3  # bits below the 32nd are random, too
    assert abs(float(torch.corrcoef(torch.stack([fine.flatten(), u.flatten()]))[0, 1])) < 5 / u.numel() ** 0.5


def test_integers() -> None:
    stream = Stream(4, "prompts")
    drawn = stream.integers((0,), 7, 7001)
    assert len(drawn) == 7001
    assert stats.chisquare([drawn.count(i) for i in range(7)]).pvalue > 1e-3
    assert set(drawn) == set(range(7))
    assert stream.integers((0,), 7, 5) == drawn[:5]
    assert stream.integers((1,), 7, 50) != drawn[:50]
    assert stream.integers((0,), 1, 3) == [0, 0, 0]
    assert stream.integers((0,), 7, 0) == []


@given(st.integers(0, 60), st.integers(-5, 5))
@settings(deadline=None)
def test_a_permutation_is_one(n: int, id: int) -> None:
    assert sorted(Stream(0, "order").permutation((id,), n)) == list(range(n))


def test_all_permutations_are_equally_likely() -> None:
    stream = Stream(0, "order")
    seen = [tuple(stream.permutation((i,), 3)) for i in range(600)]
    counts = [seen.count(order) for order in itertools.permutations(range(3))]
    assert sum(counts) == 600
    assert stats.chisquare(counts).pvalue > 1e-3


def test_no_rows_and_no_elements() -> None:
    stream = Stream(0, "x")
    assert stream.normal([], (3, 4)).shape == (0, 3, 4)
    assert stream.normal(IDS[:2], (0, 4)).shape == (2, 0, 4)
    assert stream.uniform([], ()).shape == (0,)


def test_bad_arguments() -> None:
    stream = Stream(0, "x")
    with pytest.raises(ValueError, match="high: 0"):
        stream.integers((0,), 0, 1)
    with pytest.raises(ValueError, match="high"):
        stream.integers((0,), 2**32 + 1, 1)
    with pytest.raises(ValueError, match="count: -1"):
        stream.integers((0,), 2, -1)
    with pytest.raises(ValueError, match="n: -1"):
        stream.permutation((0,), -1)
    with pytest.raises(ValueError, match="shape"):
        stream.normal([(0,)], (-1,))
    with pytest.raises(ValueError, match="shape"):
        stream.normal([(0,)], (2**20, 2**14))
