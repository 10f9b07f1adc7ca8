"""Noise against Random123's published vectors, scipy's normal, and the laws of the design page."""

import hashlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tempflow.core.rng import _FEW, Stream, fold, philox

# tests/kat_vectors of Random123, philox4x32 with 10 rounds: counter, key, output
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
IDS = [(0, prompt, node) for prompt in range(8) for node in range(8)]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def test_known_answers_with_a_key_for_each_row() -> None:
    counter, key, want = (torch.tensor([words(row[i]) for row in KNOWN]) for i in range(3))
    assert torch.equal(philox(counter, key), want)


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_known_answers_with_one_key(counter: str, key: str, want: str) -> None:
    got = philox(torch.tensor([words(counter)] * 19), torch.tensor(words(key)))
    assert got.tolist() == [words(want)] * 19


def big_integer_philox(counter: list[int], key: list[int]) -> list[int]:
    """The same function on Python's own integers, which cannot overflow."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for i in range(10):
        left, right = divmod(0xD2511F53 * c0, 1 << 32), divmod(0xCD9E8D57 * c2, 1 << 32)
        x, y = (k0 + i * 0x9E3779B9) % (1 << 32), (k1 + i * 0xBB67AE85) % (1 << 32)
        c0, c1, c2, c3 = right[0] ^ c1 ^ x, right[1], left[0] ^ c3 ^ y, left[1]
    return [c0, c1, c2, c3]


word = st.integers(0, 2**32 - 1)


@given(st.lists(word, min_size=4, max_size=4), st.lists(word, min_size=2, max_size=2))
def test_philox_equals_big_integers(counter: list[int], key: list[int]) -> None:
    got = philox(torch.tensor([counter] * 9), torch.tensor(key))
    assert got.tolist() == [big_integer_philox(counter, key)] * 9


def test_philox_refuses_other_shapes() -> None:
    key = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="counter"):
        philox(torch.zeros(3, 2, dtype=torch.int64), key)
    with pytest.raises(ValueError, match="int32"):
        philox(torch.zeros(3, 4, dtype=torch.int32), key)
    with pytest.raises(ValueError, match="key"):
        philox(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64))


@given(st.lists(st.integers(-(2**200), 2**200), max_size=5), st.lists(st.integers(-300, 300), max_size=5))
def test_fold_tells_identities_apart(a: list[int], b: list[int]) -> None:
    assert (fold(*a) == fold(*b)) == (a == b)
    assert all(0 <= part < 2**32 for part in fold(*a))


def test_fold_is_fixed_for_all_time() -> None:
    """A changed hash would silently change every run: 96 bits of BLAKE2b over length-prefixed integers."""
    packed = bytes([1, 0, 0, 0, 7]) + bytes([1, 0, 0, 0, 255]) + bytes([2, 0, 0, 0, 255, 0])
    digest = hashlib.blake2b(packed, digest_size=12).digest()
    assert fold(7, -1, 255) == tuple(int.from_bytes(digest[i : i + 4], "little") for i in (0, 4, 8))


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
    """40 000 blocks in all: more than are worked on at a time, and not a multiple of it."""
    stream = Stream(3, "steps")
    together = stream.normal(IDS[:4], (40_001,))
    assert torch.equal(stream.normal(IDS[2:3], (40_001,))[0], together[2])
    assert torch.equal(stream.normal(IDS[3:4], (37,))[0], together[3, :37])
    assert torch.equal(stream.uniform(IDS[:4], (40_001,))[3], stream.uniform(IDS[3:4], (40_001,))[0])


def test_threads_change_nothing() -> None:
    stream, before = Stream(1, "x"), torch.get_num_threads()
    try:
        drawn: list[torch.Tensor] = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            drawn.append(stream.normal(IDS, (2048,)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(drawn[0], drawn[1])


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


def test_the_four_places_of_a_block_are_uncorrelated_normals() -> None:
    z = Stream(5, "places").normal([(i,) for i in range(100)], (1024,)).double().view(-1, 4)
    for place in range(4):
        assert stats.kstest(z[:, place].numpy(), "norm").pvalue > 1e-3
    off_diagonal = torch.corrcoef(z.T) - torch.eye(4)
    assert float(off_diagonal.abs().max()) < 4.5 / len(z) ** 0.5
    # sin and cos of one angle are uncorrelated however they are built; their squares only if the radius is right
    off_diagonal = torch.corrcoef(z.square().T) - torch.eye(4)
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
    """Undo Box–Muller: exp(−r²/2) is the first word of a half block, which a uniform would show as its leading bits."""
    stream, id = Stream(0, "a"), (1, 2)
    z = stream.normal([id], (4096, 2, 2))[0].double()
    first = (-z.square().sum(2) / 2).exp()
    u = stream.uniform([id], (4096, 2))[0]
    assert stats.kstest(first.flatten().numpy(), "uniform").pvalue > 1e-3
    assert float(torch.corrcoef(torch.cat([first, u], dim=1).T).triu(1).abs().max()) < 5 / 64


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


def test_few_words_on_integers_are_those_of_many_on_tensors() -> None:
    stream = Stream(-3, "words")
    few, many = (stream.integers((5, -1), 1 << 32, count) for count in (2 * _FEW, 2 * _FEW + 1))
    assert few == many[:-1] and len(set(few)) == 2 * _FEW


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
